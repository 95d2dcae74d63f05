"""LeRobot plug-in: the environment type `irasim` of `lerobot-eval` and `lerobot-train`.

    lerobot-eval --policy.path=POLICY --env.discover_packages_path=irasim_diffusers.lerobot --env.type=irasim

`config` requires LeRobot 0.6 or newer. `env` does not; as `env.py` of a Hub repository it is an environment of LeRobot's EnvHub.
"""
