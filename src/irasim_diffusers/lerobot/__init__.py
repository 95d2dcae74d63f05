"""LeRobot plug-in: the environment type `irasim` of `lerobot-eval` and `lerobot-train`.

    lerobot-eval --policy.path=POLICY --env.discover_packages_path=irasim_diffusers.lerobot --env.type=irasim

The module `config` requires LeRobot 0.6 or newer. The module `env` does not: a Hub repository that contains a copy of `env` as
`env.py` is an environment of LeRobot's EnvHub.
"""
