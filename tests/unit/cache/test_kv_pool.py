"""KV storage: shapes, sizes, and what it costs."""

import resource
from dataclasses import replace

import numpy as np
import pytest
import torch

from tokenspeed.cache import KVPool, KVPools
from tokenspeed.core.config import KVSpec
from tokenspeed.core.errors import ConfigError, InsufficientMemory

CPU = torch.device("cpu")
WIDE = KVSpec(layers=3, kv_heads=2, head_dim=8, dtype="bfloat16")
NARROW = KVSpec(layers=1, kv_heads=1, head_dim=4, dtype="float32")


def test_each_layer_has_its_own_k_and_v_of_the_specs_shape() -> None:
    pools = KVPools([WIDE, NARROW], pages=5, page_size=16, device=CPU)
    tensors = [tensor for layer in range(3) for tensor in pools.layer(0, layer)]
    assert {tensor.shape for tensor in tensors} == {(5, 16, 2, 8)}
    assert {tensor.dtype for tensor in tensors} == {torch.bfloat16}
    assert len({tensor.data_ptr() for tensor in tensors}) == 6
    assert pools.layer(1, 0)[0].shape == (5, 16, 1, 4)
    held = sum(tensor.nbytes for tensor in [*tensors, *pools.layer(1, 0)])
    assert pools.size_bytes == held


def test_rounded_heads_have_their_scale_beside_them() -> None:
    spec = KVSpec(layers=2, kv_heads=3, head_dim=64, dtype="int8")
    assert spec.token_size_bytes == 2 * 2 * 3 * (64 + 4)
    pool = KVPool(spec, pages=5, page_size=32, device=CPU, host_pages=4)
    k, v = pool.layer(1)
    assert k.shape == v.shape == (5, 32, 3, 68)
    assert k.dtype == torch.int8
    assert pool.size_bytes == 5 * 32 * spec.token_size_bytes
    assert pool.host_size_bytes == 4 * 32 * spec.token_size_bytes
    for index, tensor in enumerate((k, v)):
        tensor.copy_(torch.arange(5).view(5, 1, 1, 1) + 10 * index)
    pool.store(np.array([4, 1], dtype=np.int32), np.array([0, 3], dtype=np.int32))
    pool.load(np.array([0, 3], dtype=np.int32), np.array([2, 0], dtype=np.int32))
    assert [int(k[page].unique()) for page in range(5)] == [1, 1, 4, 3, 4]
    assert [int(v[page].unique()) for page in range(5)] == [11, 11, 14, 13, 14]


def test_a_latent_is_kept_once() -> None:
    spec = KVSpec(layers=2, kv_heads=1, head_dim=576, dtype="bfloat16", latent=True)
    assert spec.token_size_bytes == 2 * 576 * 2
    pools = KVPools([spec], pages=3, page_size=32, device=CPU, host_pages=2)
    latents = pools.latents(0, 1)
    assert latents.shape == (3, 32, 576)
    assert pools.size_bytes == 3 * 32 * spec.token_size_bytes
    latents.copy_(torch.arange(3).view(3, 1, 1))
    pools.pools[0].store(np.array([2], dtype=np.int32), np.array([1], dtype=np.int32))
    pools.pools[0].load(np.array([1], dtype=np.int32), np.array([0], dtype=np.int32))
    assert [int(latents[page].unique()) for page in range(3)] == [2, 1, 2]
    with pytest.raises(ConfigError, match="--kv-dtype auto"):
        replace(spec, dtype="int8")


def test_a_pool_costs_no_memory_until_it_is_written() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pool = KVPool(WIDE, pages=100_000, page_size=32, device=CPU)
    assert pool.size_bytes == 614_400_000
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown_kib * 1024 < pool.size_bytes / 10


def test_a_pool_that_cannot_be_had_says_what_it_needed() -> None:
    with pytest.raises(InsufficientMemory, match=r"bytes on cpu.*--kv-cache-memory"):
        KVPool(WIDE, pages=2**45, page_size=32, device=CPU)
