"""What stands in `ptx.cuh`: the emulated twins trust the names, so the names must tell the truth."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[1] / "kernels_cu"
WRAPPER = re.compile(
    r"__device__ __forceinline__ \S+ (\w+)\([^{]*?\) \{(.*?)(?:^| )\}$", re.DOTALL | re.MULTILINE
)
WRAPPERS = WRAPPER.findall((SOURCES / "ptx.cuh").read_text())
ASSEMBLY = re.compile(r"asm(?: volatile)?\((.*?)\);\s*(?:return|$)", re.DOTALL)

# A name may stand for several wrappers, of different types.
INSTRUCTIONS = {
    "ld_acquire_sys": ["ld.acquire.sys.global.u64"],
    "st_release_sys": ["st.release.sys.global.u64"],
    "st_relaxed_sys": ["st.relaxed.sys.global.u64", "st.relaxed.sys.global.v4.u32"],
    "ld_relaxed_sys": ["ld.relaxed.sys.global.u64", "ld.relaxed.sys.global.v4.u32"],
    "ld_relaxed_gpu": ["ld.relaxed.gpu.global.u64"],
    "st_relaxed_gpu": ["st.relaxed.gpu.global.u64"],
    "st_release_gpu": ["st.release.gpu.global.u64"],
    "ld_acquire_gpu": ["ld.acquire.gpu.global.u64"],
    "atom_add_acq_rel_gpu": ["atom.acq_rel.gpu.global.add.u64"],
    "atom_cas_acq_rel_gpu": ["atom.acq_rel.gpu.global.cas.b64"],
    "atom_inc_relaxed_gpu": ["atom.relaxed.gpu.global.inc.u32"],
    "ld_stream": ["ld.global.cs.f32", "ld.global.cs.v4.u32"],
    "st_stream": ["st.global.cs.v4.u32", "st.global.cs.v2.u32"],
    "cvt_f32_f16": ["cvt.f32.f16"],
    "cvt_rn_f16x2_f32": ["cvt.rn.f16x2.f32"],
    "cvt_rn_bf16x2_f32": ["cvt.rn.bf16x2.f32"],
    "ex2_approx_ftz": ["ex2.approx.ftz.f32"],
    "cvt_rn_satfinite_e4m3x2_f32": ["cvt.rn.satfinite.e4m3x2.f32"],
    "launch_dependents": ["griddepcontrol.launch_dependents"],
    "wait_for_prerequisites": ["griddepcontrol.wait"],
    "fence_proxy_async": ["fence.proxy.async"],
    "fence_proxy_async_shared": ["fence.proxy.async.shared::cta"],
    "mbarrier_init": ["mbarrier.init.shared::cta.b64"],
    "fence_mbarrier_init": ["fence.mbarrier_init.release.cluster"],
    "mbarrier_arrive_expect": ["mbarrier.arrive.expect_tx.shared::cta.b64"],
    "bulk_load": ["cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"],
    "bulk_store": ["cp.async.bulk.global.shared::cta.bulk_group"],
    "bulk_commit": ["cp.async.bulk.commit_group"],
    "bulk_wait_read": ["cp.async.bulk.wait_group.read"],
    "bulk_wait_landed": ["cp.async.bulk.wait_group"],
    "globaltimer_ns": ["mov.u64"],
}
# Arithmetic, which touches no memory.
PURE = {name for name in INSTRUCTIONS if name.startswith("cvt_") or "_approx" in name}
# Not one instruction: an address conversion without assembly, and a wait that hands out its predicate.
OTHERS = {"smem_address", "mbarrier_try_wait"}


def assembly(name: str) -> list[str]:
    """The inline assembly of every wrapper called `name`."""
    return [text for found, body in WRAPPERS if found == name for text in ASSEMBLY.findall(body)]


def test_every_wrapper_is_listed() -> None:
    assert {name for name, _ in WRAPPERS} == set(INSTRUCTIONS) | OTHERS


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_wrapper_is_one_instruction_that_clobbers_memory(name: str) -> None:
    statements = assembly(name)
    assert [re.match(r'\s*"([^" ;]+)', text)[1] for text in statements] == INSTRUCTIONS[name]  # type: ignore[index]
    for statement in statements:
        template = statement.partition('"')[2].partition('"')[0]
        assert template.count(";") == 1
        assert name in PURE or statement.rstrip().endswith('"memory"')


def test_inline_assembly_lives_in_one_file() -> None:
    with_assembly = [path.name for path in SOURCES.glob("*.cu*") if re.search(r"\basm\b", path.read_text())]
    assert with_assembly == ["ptx.cuh"]


def test_nothing_traps_and_nothing_polls_by_volatile() -> None:
    for path in SOURCES.glob("*.cu*"):
        code = re.sub(r"asm volatile|//.*", "", path.read_text())
        assert not re.search(r"__trap|\bassert\(|\bvolatile\b", code), path.name
