"""One model on several processes, each with a share of the patches of every frame."""

import os
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig, FirstBlockCacheConfig, ParallelConfig
from diffusers.hooks.context_parallel import apply_context_parallel
from fork_server import fork_server
from tiny_models import ARCHITECTURES, tiny_pipeline, tiny_transformer
from torch.distributed.device_mesh import init_device_mesh

FRAMES = np.random.default_rng(2).integers(0, 256, (2, 8, 12, 3), dtype=np.uint8)
ACTIONS = np.random.default_rng(3).normal(size=(7, 3))

# models whose patches can be divided among processes
DIVISIBLE = {name: changes for name, changes in ARCHITECTURES.items() if not changes.get("ff_conv")}


def inputs(height=4, width=6):
    torch.manual_seed(4)
    return torch.randn(3, 4, 5, height, width), torch.tensor([7, 500, 999]), torch.randn(3, 3, 3)


def enable_on_cpu(model, config):
    """Call `enable_parallelism` without its check of the number of accelerators."""
    mesh = init_device_mesh("cpu", config.mesh_shape, mesh_dim_names=config.mesh_dim_names)
    model._parallel_config = ParallelConfig(context_parallel_config=config)
    model._parallel_config.setup(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), mesh=mesh)
    for processor in model.attn_processors.values():
        processor._parallel_config = model._parallel_config
    apply_context_parallel(model, config, model._cp_plan)


def video(pipeline):
    generator = torch.Generator().manual_seed(0)
    kwargs = {"num_inference_steps": 2, "guidance_scale": 2.0, "output_type": "pt"}
    return pipeline(FRAMES, ACTIONS, generator=generator, **kwargs).frames


def work(rank, folder):
    """Run one of two processes: predict with half of the patches and save the result."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    results, lengths = {}, {}
    with torch.no_grad():
        for name, changes in DIVISIBLE.items():
            model = tiny_transformer(**changes)
            enable_on_cpu(model, ContextParallelConfig(ulysses_degree=2))
            seen = lengths[name] = []
            for block in (model.transformer_blocks[0], model.temporal_transformer_blocks[1]):
                block.attn1.to_q.register_forward_hook(lambda _, args, __, seen=seen: seen.append(args[0].shape))
            results[name] = model(*inputs()).sample
    pipeline = tiny_pipeline()
    enable_on_cpu(pipeline.transformer, ContextParallelConfig(ulysses_degree=2))
    results["video"] = video(pipeline)
    pipeline.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    try:
        video(pipeline)
    except ValueError as error:
        results["refusal"] = str(error)
    torch.save((results, lengths), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def parallel(tmp_path_factory):
    """Results of two processes."""
    folder = tmp_path_factory.mktemp("parallel")
    code = "import sys; from test_context_parallel import work; work(int(sys.argv[1]), sys.argv[2])"
    processes = [fork_server().start("-c", code, rank, folder) for rank in range(2)]
    try:
        while None in (statuses := [process.poll() for process in processes]):
            assert set(statuses) <= {None, 0}, "\n".join(process.stderr for process in processes)
            time.sleep(0.05)
        assert statuses == [0, 0], "\n".join(process.stderr for process in processes)
    finally:
        for process in processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", DIVISIBLE)
def test_two_processes_match_one(name, parallel):
    expected = tiny_transformer(**ARCHITECTURES[name])(*inputs()).sample
    for results, lengths in parallel:
        torch.testing.assert_close(results[name], expected, rtol=1e-4, atol=1e-5)
        # three of six patches in all fifteen frames, and all five frames of three patches in three clips
        assert lengths[name] == [(15, 3, 24), (9, 5, 24)]


def test_two_processes_generate_the_same_video(parallel):
    for results, _ in parallel:
        torch.testing.assert_close(results["video"], video(tiny_pipeline()), rtol=1e-4, atol=1e-5)


def test_first_block_cache_raises(parallel):
    for results, _ in parallel:
        assert results["refusal"].startswith("`FirstBlockCacheConfig` does not support context parallelism")


CUDA_CASES = {
    "ring": ({"ring_degree": 2}, {}),
    "ulysses": ({"ulysses_degree": 2}, {}),
    "five patches": ({"ulysses_degree": 2, "ulysses_anything": True}, {"height": 2, "width": 10}),
}


def work_on_cuda(rank, folder):
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    results = {}
    for name, (degrees, size) in CUDA_CASES.items():
        model = tiny_transformer(attention_head_dim=16).to("cuda", torch.bfloat16)
        model.set_attention_backend("_native_flash")
        model.enable_parallelism(config=ContextParallelConfig(**degrees))
        hidden_states, timestep, actions = (tensor.cuda() for tensor in inputs(**size))
        with torch.no_grad():
            results[name] = model(hidden_states.bfloat16(), timestep, actions).sample.float().cpu()
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_devices_match_one(tmp_path):
    torch.multiprocessing.spawn(work_on_cuda, (str(tmp_path),), nprocs=2)
    for rank in range(2):
        results = torch.load(tmp_path / f"{rank}.pt")
        for name, (_, size) in CUDA_CASES.items():
            expected = tiny_transformer(attention_head_dim=16)(*inputs(**size)).sample
            assert (results[name] - expected).square().mean().sqrt() < 0.03 * expected.std()
