"""The tools that judge Triton kernels without a GPU, and the plain kernels to compare with."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from triton import knobs
from triton.runtime import driver
from triton.runtime.errors import OutOfResources

from bench import plain_triton, static_cost
from bench.offline import offline_gpu, resources, sass
from bench.sass import (
    SHARED_LOOKUP,
    Instruction,
    Mark,
    classify,
    cost,
    flat,
    loops,
    parse,
    tensor_shape,
)
from bench.static_cost import PLAIN, TILE, Case, measure, plain_name

ROOT = Path(__file__).parent.parent
CAPABILITIES = (80, 90, 100)
WARPS = 4


@triton.jit
def _look_up(table_ptr, x):
    return tl.load(table_ptr + (x * 3.0).to(tl.int32))


@triton.jit
def _toy_kernel(x_ptr, table_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], tl.float32)
    for start in range(0, n, BLOCK):
        x = tl.load(x_ptr + start + offs)
        acc += tl.exp2(x) * _look_up(table_ptr, x)
    tl.store(out_ptr + offs, acc)


@triton.jit
def _nested_kernel(x_ptr, out_ptr, n, heads, BLOCK: tl.constexpr):
    """A square root for each pair, an exponential for each pair and head."""
    offs = tl.arange(0, BLOCK)
    for start in range(0, n, BLOCK):
        root = tl.sqrt(tl.load(x_ptr + start + offs))
        for head in range(heads):
            tl.atomic_add(out_ptr + head * BLOCK + offs, tl.exp2(root * head))


@triton.jit
def _straight_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tl.exp2(tl.load(x_ptr + offs)))


@triton.jit
def _greedy_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x = tl.load(x_ptr + offs)
    for _ in range(3):
        x = x * tl.sum(x, 1)[:, None] + tl.sum(x, 0)[None, :]
    tl.store(out_ptr + offs, x)


def toy(n=1024):
    _toy_kernel[(3,)](*toy_tensors(), n, BLOCK=512, num_warps=WARPS)


def toy_tensors():
    return torch.zeros(4096), torch.zeros(99), torch.zeros(512)


def compiled_toy(capability=90):
    with offline_gpu(capability) as launches:
        toy()
    return launches[0].compiled


def toy_case(**changes):
    fields = {"pairs": 512, "kernels": ("_toy_kernel",), **changes}
    return Case("toy", toy, **fields)


# What the offline GPU records


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_a_launch_is_compiled_for_its_gpu_and_recorded(capability):
    with offline_gpu(capability) as launches:
        toy(1024)
        toy(1024)
        toy(1001)
    first, second, odd = launches
    assert (first.name, first.grid, first.num_warps) == ("_toy_kernel", (3, 1, 1), WARPS)
    assert first.constants == {"BLOCK": 512}
    assert first.compiled.metadata.target.arch == capability
    assert re.search(rf"\.target sm_{capability}", first.compiled.asm["ptx"])
    assert first.compiled.asm["cubin"][:4] == b"\x7fELF"
    assert second.compiled is first.compiled
    assert odd.compiled.hash != first.compiled.hash, "1024 is divisible by 16, 1001 is not"


def test_each_block_has_a_list_of_its_own_and_the_driver_comes_back():
    before = driver._active
    with offline_gpu(90) as outer:
        toy()
        with offline_gpu(80) as other, offline_gpu(90) as inner:
            toy()
            with offline_gpu(80):
                toy()
        toy()
    assert (len(outer), len(other), len(inner)) == (2, 0, 1)
    assert outer[0].compiled is inner[0].compiled
    with pytest.raises(KeyError), offline_gpu(80):
        raise KeyError
    assert driver._active is before


def test_real_devices_do_not_meet_what_was_compiled_offline():
    compiled_toy()
    assert all(device > 1000 for device in _toy_kernel.device_caches)


def test_what_a_gpu_would_refuse_is_refused():
    q = torch.zeros(1, 256, 1, 128, dtype=torch.float16)
    with offline_gpu(80), pytest.raises(OutOfResources, match="shared memory"):
        plain_triton.forward(q, q, q, kappa=1, num_stages=7)
    with pytest.raises(ValueError, match="capability: expected one of"), offline_gpu(86):
        pass


def test_a_recorded_launch_costs_microseconds():
    tensors = toy_tensors()
    with offline_gpu(90) as launches:
        seconds = []
        for _ in range(300):
            start = time.perf_counter()
            _toy_kernel[(3,)](*tensors, 1024, BLOCK=512, num_warps=WARPS)
            seconds.append(time.perf_counter() - start)
    assert len(launches) == 300
    assert min(seconds) < 100e-6


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_resources_are_those_of_the_binary(capability, tmp_path):
    compiled = compiled_toy(capability)
    (tmp_path / "toy.cubin").write_bytes(compiled.asm["cubin"])
    command = [knobs.nvidia.cuobjdump.path, "-res-usage", tmp_path / "toy.cubin"]
    said = subprocess.run(command, capture_output=True, text=True, check=True)
    needs = resources(compiled)
    assert f"REG:{needs.registers} STACK:{needs.stack} " in said.stdout + said.stderr
    assert needs.shared == compiled.metadata.shared
    assert needs.spill_stores == needs.spill_loads == 0


def test_spills_are_seen():
    x = torch.zeros(64 * 64)
    with offline_gpu(90) as launches:
        _greedy_kernel[(1,)](x, x, BLOCK=64, num_warps=8)
        _greedy_kernel[(1,)](x, x, BLOCK=64, num_warps=8, maxnreg=24)
    easy, tight = (resources(launch.compiled) for launch in launches)
    assert easy.spill_stores == easy.spill_loads == 0
    assert tight.registers <= 24 and min(tight.spill_stores, tight.spill_loads, tight.stack) >= 4
    local = [cost(parse(sass(launch.compiled))).kinds["local"] for launch in launches]
    assert local[0] == 0 and local[1] >= 2


# Reading machine code

SAMPLE = """
.text.sample:
	//## File "/a/b.py", line 7
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
.L_x_1:
	//## File "/a/b.py", line 9
        /*0020*/                   FFMA R4, R4, R5, R6 ;
        /*0030*/              @!P1 BRA `(.L_x_2) ;
        /*0040*/                   MUFU.EX2 R20, R11 ;
.L_x_2:
        /*0050*/              @!PT LDS RZ, [RZ] ;
        /*0060*/                   BRA.U UP0, `(.L_x_1) ;
        /*0070*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R3 ;
        /*0080*/              @!P0 BRA `(.L_x_4) ;
.L_x_3:
        /*0090*/                   IADD3 R3, R3, 0x1, RZ ;
        /*00a0*/               @P2 BRA `(.L_x_0) ;
        /*00b0*/                   EXIT ;
.L_x_4:
        /*00c0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R3 ;
        /*00d0*/              @!P0 BRA `(.L_x_4) ;
        /*00e0*/                   BRA `(.L_x_3) ;
.L_x_5:
        /*00f0*/                   BRA `(.L_x_5);
"""


def test_instructions_are_parsed():
    code = parse(SAMPLE)
    assert [x.address for x in code] == list(range(0, 0x100, 16))
    load, skip, never = code[1], code[3], code[5]
    assert (load.opcode, load.operands) == ("LDG.E.128", ("R4", "desc[UR4][R2.64]"))
    assert (load.stem, load.bits, load.file, load.line) == ("LDG", 128, "/a/b.py", 7)
    assert (skip.predicate, skip.target, skip.line) == ("!P1", 0x50, 9)
    assert never.never and not skip.never


def test_loops_are_found_also_where_they_leave_for_the_end_of_the_kernel():
    (outer,) = loops(parse(SAMPLE))
    assert [(height, loop.start) for height, loop in flat([outer])] == [(1, 0x10), (0, 0x20)]
    (inner,) = outer.inner
    assert [x.address for x in inner.body] == [0x20, 0x30, 0x40, 0x50, 0x60]
    assert inner.conditional == 1, "the exponential can be skipped"
    assert {0xC0, 0xD0, 0xE0} < outer.addresses, "the slow way of waiting"
    assert 0xF0 not in outer.addresses and 0xB0 not in outer.addresses
    assert outer.conditional == 3 and not {x.stem for x in outer.own} & {"FFMA", "MUFU"}


def one(opcode, *operands, **changes):
    return cost([Instruction(0, "", opcode, operands)], **changes).pipes


def test_pipes_take_the_clocks_that_their_lanes_need():
    assert one("FFMA")["fma"] == one("FFMA")["issue"] == 0.25
    assert (one("IMAD.WIDE")["fma"], one("IMAD.WIDE")["fma heavy"]) == (0.25, 0.5)
    assert one("FFMA", capability=80)["fma"] == 0.5
    assert one("FSETP.GEU.AND")["alu"] == 0.5
    assert one("MUFU.EX2")["xu"] == one("F2I.TRUNC.NTZ")["xu"] == 2
    assert one("UIADD3")["issue"] == sum(one("UIADD3").values()) == 0.25


def test_memory_takes_wavefronts_and_lines():
    assert one("LDS")["shared"] == 1 and one("LDS.U.128")["shared"] == 4
    assert one("LDSM.16.MT88.4")["shared"] == 4
    assert one("LDG.E.128")["l1"] == one("LDG.E.128")["memory"] == 4
    assert one("STG.E.U16")["l1"] == 1
    copy = one("LDGSTS.E.BYPASS.128")
    assert (copy["l1"], copy["shared"], copy["memory"]) == (4, 4, 8)
    random = Mark("", SHARED_LOOKUP, "LDS")
    assert one("LDS.64", marks=[random])["shared"] == SHARED_LOOKUP[64]
    assert one("STS.64", marks=[random])["shared"] == 2
    assert one("SHFL.BFLY")["shared"] == 1


def test_tensor_cores_take_clocks_by_shape():
    assert tensor_shape("HMMA.16816.F32.BF16") == (16, 8, 16)
    assert tensor_shape("HMMA.1688.F32.TF32") == (16, 8, 8)
    assert tensor_shape("IMMA.16832.S8.S8") == (16, 8, 32)
    assert tensor_shape("HGMMA.64x32x16.F32.BF16") == (16, 32, 16)
    assert one("HMMA.16816.F32.BF16")["tensor"] == one("HMMA.1688.F32.TF32")["tensor"] == 1
    assert one("HMMA.16816.F32", capability=80)["tensor"] == 2
    both = one("HGMMA.64x64x16.F32.BF16", "R24", "gdesc[UR8]", "R24")
    assert 4 * both["tensor"] == 32, "64 x 64 x 16 / 2048, by four warps"
    assert 4 * both["shared"] == 32, "two operands of 64 x 16 numbers of 2 bytes"
    second = one("HGMMA.64x32x16.F32.BF16", "R56", "R72", "gdesc[UR8].tnspB", "R56")
    assert 4 * second["shared"] == 8


def test_an_unknown_opcode_is_reported():
    assert classify("XYZZY.E") is None
    assert cost([Instruction(0, "", "XYZZY.E", ())]).unknown == {"XYZZY.E": 1}


def test_a_toy_kernel_has_the_instructions_of_its_source():
    (loop,) = loops(parse(sass(compiled_toy())))
    counted = cost(loop.body)
    rounds = counted.opcodes["MUFU.EX2"] // 4  # 512 numbers, 128 threads
    assert rounds >= 1
    loads = sum(n for name, n in counted.opcodes.items() if name.startswith("LDG"))
    assert loads == rounds * (1 + 4), "a load of 128 bits, four lookups"
    assert counted.kinds["convert"] == counted.kinds["mufu"] == 4 * rounds
    assert counted.opcodes["FFMA"] == counted.opcodes["FMUL"] == 4 * rounds
    assert not counted.unknown and not counted.kinds["shared"]
    lookups = cost(loop.body, marks=[Mark(_look_up, {32: 14})]).pipes["l1"]
    assert lookups == rounds * (4 + 4 * 14), "one load of four lines, four lookups of 14"
    assert cost(loop.body, marks=[Mark(r"x_ptr \+ start", {128: 9})]).pipes["l1"] == rounds * 13


# Plain flash attention


def plain(kind, numbers="bf16", dim=16):
    return next(case for case in PLAIN if case.name == plain_name(kind, numbers, dim))


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_plain_kernels_multiply_as_often_as_the_formulas_say(capability):
    with offline_gpu(capability) as launches:
        plain("forward").launch()
        plain("backward").launch()
    assert len(launches) == 3
    for launch, products in zip(launches, (2, 3, 4), strict=True):
        (loop,) = loops(parse(sass(launch.compiled)))
        counted = cost(loop.own, capability=capability)
        assert not resources(launch.compiled).spill_stores
        if capability == 100:  # shapes stand in a descriptor there
            assert set(counted.unknown) == {"UTCHMMA"}
        else:
            assert not counted.unknown
            assert counted.macs * WARPS == products * TILE * 16


INTERPRETED = """
    import json
    import torch
    from torch.nn.functional import scaled_dot_product_attention as sdpa
    from triton.runtime import interpreter
    from bench import plain_triton

    # triton 3.6 turns arrays of one number into an index by int(), which numpy 2.4 refuses.
    patch = interpreter._patch_lang_tensor
    def patched(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))
    interpreter._patch_lang_tensor = patched

    def torchs(q, k, v, do):
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        out = sdpa(*(x.transpose(1, 2) for x in (q, k, v)), scale=0.3).transpose(1, 2)
        return out.detach(), *torch.autograd.grad(out, (q, k, v), do)

    def ours(q, k, v, do):
        out, lse = plain_triton.forward(q, k, v, kappa=0.3)
        return out, *plain_triton.backward(q, k, v, out, lse, do, kappa=0.3)

    torch.manual_seed(0)
    errors = {}
    for n, dim in ((1, 16), (17, 16), (64, 32), (65, 16), (130, 32)):
        inputs = torch.randn(4, 2, n, 2, dim)
        exact = torchs(*inputs.double())
        errors[n] = [
            [float((x - y).norm() / y.norm().clamp_min(1e-3)) for x, y in zip(got, exact)]
            for got in (ours(*inputs), torchs(*inputs))
        ]
    print(json.dumps(errors))
"""


def test_plain_kernels_compute_attention_and_its_gradients():
    command = [sys.executable, "-c", textwrap.dedent(INTERPRETED)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    errors = json.loads(done.stdout)
    assert len(errors) == 5
    for ours, torchs in errors.values():
        for a, b in zip(ours, torchs, strict=True):
            assert a <= 4 * (b + torch.finfo(torch.float32).eps)


# The report


def test_rounds_that_ptxas_put_together_do_not_change_the_cost_of_a_pair():
    (rows,) = measure(toy_case())
    (row,) = rows
    assert row.work.clocks["xu"] == TILE / 32 * 2 * 2, "an exponential and a conversion each"
    assert row.work.kinds["mufu"] == TILE / 32
    assert row.programs == 16 and row.needs.spill_loads == 0


def test_nested_loops_share_what_pairs_have_in_common():
    x = torch.zeros(4096)
    case = Case(
        "nested",
        lambda: _nested_kernel[(1,)](x, x, 4096, 7, BLOCK=256, num_warps=WARPS),
        pairs=(256, 256 * 7),
        kernels=("_nested_kernel",),
    )
    ((outer, inner, total),) = measure(case)
    assert total.label == "sum" and outer.label.endswith("outer")
    assert inner.work.kinds["mufu"] == TILE / 32
    assert 1 <= outer.work.kinds["mufu"] * 7 * 32 / TILE <= 2, "a root, perhaps its reciprocal"
    expected = inner.work.clocks["xu"] + outer.work.clocks["xu"]
    assert total.work.clocks["xu"] == pytest.approx(expected)
    ((only,),) = measure(replace(case, take=(1,)))
    assert only.work == inner.work
    with pytest.raises(ValueError, match="encloses 1 others"):
        measure(replace(case, pairs=256))


def test_a_kernel_without_a_loop_is_one_round():
    x = torch.zeros(512)
    case = Case(
        "straight",
        lambda: _straight_kernel[(1,)](x, x, BLOCK=512, num_warps=WARPS),
        pairs=512,
        kernels=("_straight_kernel",),
        whole=True,
    )
    ((row,),) = measure(case)
    assert row.work.kinds["mufu"] == TILE / 32
    with pytest.raises(ValueError, match="has no loop"):
        measure(replace(case, whole=False))


def test_pairs_are_counted_by_multiply_adds_just_as_well():
    case = plain("forward")
    assert measure(case) == measure(replace(case, per_pair=("macs", 2 * 16)))
    with pytest.raises(ValueError, match=r"holds macs for 0\.5 rounds"):
        measure(replace(case, per_pair=("macs", 4 * 16)))


def test_cases_that_do_not_fit_their_kernel_are_refused():
    with pytest.raises(ValueError, match=r"for 0\.\d+ rounds of 65536 pairs"):
        measure(toy_case(pairs=65536))
    with pytest.raises(ValueError, match=r"for \d\.\d+ rounds of 300 pairs"):
        measure(toy_case(pairs=300))
    with pytest.raises(ValueError, match="0 variants of _absent"):
        measure(toy_case(kernels=("_absent",)))
    with pytest.raises(ValueError, match="no memory instruction"):
        measure(toy_case(marks=(Mark(_straight_kernel, {32: 1}),)))
    both = Case("toy", lambda: (toy(1024), toy(1001)), 512, ("_toy_kernel",))
    with pytest.raises(ValueError, match="2 variants of _toy_kernel"):
        measure(both)


def test_the_report_compares_with_plain_attention(tmp_path, capsys, monkeypatch):
    case = toy_case(plain=plain_name("forward", "bf16", 16), marks=(Mark(_look_up, {32: 14}),))
    monkeypatch.setattr(static_cost, "GEOMETRY", [case])
    path = tmp_path / "cost.md"
    static_cost.main(["--case", "toy", "--markdown", str(path)])
    text = path.read_text()
    assert text == capsys.readouterr().out
    (clocks, _) = (line for line in text.splitlines() if line.startswith("| toy"))
    numbers = [column.strip() for column in clocks.split("|")]
    assert numbers[-3] == "memory"
    ((row,),) = measure(case)
    assert row.work.clocks["memory"] == TILE / 32 * (1 + 14), "one line is read in order"
    ((opponent,),) = measure(plain("forward"))
    ratio = row.work.busiest / opponent.work.busiest
    assert float(numbers[-2]) == pytest.approx(ratio, abs=0.01)
