"""The functions in C against float64, and what happens without a compiler."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.nn.functional import gelu, layer_norm

from rlhf_ray.algorithms.logprobs import selected_logprobs, selected_logprobs_and_entropy
from rlhf_ray.cpu import kernels
from rlhf_ray.cpu.activation import CUBE, SLOPE, SigmoidGELU
from rlhf_ray.training import packed_attention
from rlhf_ray.training.packed_attention import Layout

HALF_A_DIGIT = 2**-8  # of bfloat16, which has 8 bits: the most that rounding to the nearest moves a number
DTYPES = {torch.bfloat16: HALF_A_DIGIT, torch.float32: 2**-20}  # and how far results may be off
in_c = pytest.mark.usefixtures("processor")


@in_c
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", [3, 16, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("overwrite", [False, True])
def test_logprobs_entropies_and_gradients(threads, vocabulary, temperature, overwrite, dtype):
    torch.manual_seed(0)
    logits = (5 * torch.randn(7, vocabulary)).to(dtype)
    logits[2] -= 40.0  # a line far from 0
    ids, upstream = torch.randint(vocabulary, (7,)), torch.randn(7)
    exact = logits.double().requires_grad_()
    every = (exact / temperature).log_softmax(-1)
    expected = every.gather(1, ids[:, None]).squeeze(1)
    entropies = -(every.exp() * every).sum(-1)
    expected.backward(upstream.double())
    leaf = logits.clone().requires_grad_()
    found, entropy = selected_logprobs_and_entropy(leaf * 1, ids, temperature=temperature, overwrite=overwrite)
    torch.testing.assert_close(found.double(), expected.detach(), atol=1e-5, rtol=5e-6)
    torch.testing.assert_close(entropy.double(), entropies.detach(), atol=2e-5, rtol=2e-5)
    found.backward(upstream)
    scale, digit = upstream.abs().double()[:, None] / temperature, DTYPES[dtype]
    allowed = 2 * digit * scale * every.exp() + 1e-6 + digit * exact.grad.abs()
    assert bool(((leaf.grad - exact.grad).abs() <= allowed).all())


@in_c
@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_stay_unless_they_may_be_overwritten(dtype):
    logits, ids = torch.randn(4, 9).to(dtype), torch.zeros(4, dtype=torch.int64)
    given = logits.clone().requires_grad_() * 1
    selected_logprobs(given, ids, temperature=1.0)
    assert torch.equal(given, logits)
    selected_logprobs(given, ids, temperature=1.0, overwrite=True)
    torch.testing.assert_close(given.detach().float(), logits.float().softmax(-1), atol=0, rtol=DTYPES[dtype])


@in_c
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("overwrite", [False, True])
def test_with_a_gradient_and_without_they_are_the_same_numbers(dtype, overwrite):
    """To the bit: the first minibatch's ratio is 1."""
    logits, ids = torch.randn(40, 300).to(dtype), torch.randint(300, (40,))
    with torch.no_grad():
        before = selected_logprobs(logits, ids, temperature=0.7)
    leaf = logits.clone().requires_grad_()
    assert torch.equal(selected_logprobs(leaf * 1, ids, temperature=0.7, overwrite=overwrite), before)


@in_c
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_nan_is_not_hidden_and_minus_infinity_has_no_share(dtype):
    logits = torch.tensor([[1.0, torch.nan, 2.0], [0.0, -torch.inf, 0.0]]).to(dtype)
    found, entropy = selected_logprobs_and_entropy(logits, torch.tensor([0, 0]), temperature=1.0)
    assert torch.isnan(found[0]) and torch.isnan(entropy[0])
    assert found[1].item() == pytest.approx(-np.log(2)) and entropy[1].item() == pytest.approx(np.log(2))


@in_c
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_second_backward_pass_over_what_the_first_has_used_up_is_refused(dtype):
    logits = torch.randn(2, 5).to(dtype).requires_grad_()
    found = selected_logprobs(logits * 1, torch.tensor([0, 1]), temperature=1.0, overwrite=True).sum()
    x = torch.randn(2**17).to(dtype).requires_grad_()
    for result in (found, (SigmoidGELU()(x) * torch.ones(2**17)).sum()):
        result.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            result.backward()


@in_c
@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu_and_its_derivative(threads, dtype):
    x = torch.cat([torch.linspace(-40, 40, 5001), torch.tensor([0.0, -1e-30, 3e4, -3e4])]).to(dtype)
    exact = x.double().requires_grad_()
    expected = gelu(exact, approximate="tanh")
    (slope,) = torch.autograd.grad(expected.sum(), exact)
    result, derivative = torch.empty_like(x), torch.empty_like(x)
    kernels.kernel("gelu_forward", x, dtype=dtype)(x, result, derivative, x.numel(), SLOPE, CUBE)
    allowed = {"atol": 1e-6 if dtype == torch.bfloat16 else 2e-7, "rtol": 1.1 * DTYPES[dtype]}
    torch.testing.assert_close(result.double(), expected.detach(), **allowed)
    torch.testing.assert_close(derivative.double(), slope, **allowed)
    gradient = torch.randn(len(x)).to(dtype)
    by_x = derivative.clone()
    kernels.kernel("multiply", by_x, gradient, dtype=dtype)(by_x, gradient, x.numel())
    assert torch.equal(by_x, (gradient.float() * derivative.float()).to(dtype))


@in_c
@pytest.mark.parametrize("width", [5, 64, 100])
@pytest.mark.parametrize("with_change", [False, True])
def test_layer_norm_and_its_gradients(threads, width, with_change):
    torch.manual_seed(width)
    change = torch.randn(9, width).bfloat16()
    x, weight, bias = 3 * torch.randn(9, width) + 1, torch.randn(width), torch.randn(width)
    gradient = torch.randn(9, width).bfloat16()
    exact = [each.double().requires_grad_() for each in (x, weight, bias)]
    expected = layer_norm(exact[0], (width,), *exact[1:], 1e-5)
    expected.backward(gradient.double())
    result, means, scales = torch.empty(9, width, dtype=torch.bfloat16), torch.empty(9), torch.empty(9)
    before = x - change.float() if with_change else x
    added, hidden = (change, torch.empty_like(x)) if with_change else (None, x)
    call = kernels.kernel("layer_norm_forward")
    call(before, added, weight, bias, hidden, result, means, scales, 9, width, 1e-5)
    torch.testing.assert_close(hidden, x)
    torch.testing.assert_close(result.double(), expected.detach(), atol=1e-5, rtol=HALF_A_DIGIT)
    by_x, by_weight, by_bias = torch.empty_like(x), torch.ones(width), torch.ones(width)  # the last two are added to
    further, by_change = (torch.randn(9, width), torch.empty_like(gradient)) if with_change else (None, None)
    call = kernels.kernel("layer_norm_backward")
    call(gradient, further, x, weight, means, scales, by_x, by_change, by_weight, by_bias, 9, width)
    for found, leaf in zip((by_x, by_weight - 1, by_bias - 1), exact, strict=True):
        more = further.double() if with_change and found is by_x else 0.0
        torch.testing.assert_close(found.double(), leaf.grad + more, atol=2e-5, rtol=1e-5)
    assert not with_change or torch.equal(by_change, by_x.bfloat16())


@in_c
def test_sums_of_gradients(threads):
    part = torch.randn(7, 100).bfloat16()
    total, columns = torch.randn(7, 100), torch.randn(100)
    expected = total + part.float(), columns + part.float().sum(0)
    kernels.kernel("accumulate")(total, part, part.numel())
    kernels.kernel("accumulate_lines")(columns, part, 7, 100)
    assert torch.equal(total, expected[0])
    torch.testing.assert_close(columns, expected[1])


@in_c
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [[5, 1, 40], [33, 33], [1], [130, 70]])
@pytest.mark.parametrize("heads, groups", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("channels", [8, 32, 64])
def test_causal_attention_of_sequences_on_a_line(threads, lengths, heads, groups, channels, dtype):
    """Each sequence by itself in float64, as the definition has it; queries, keys and values in one tensor, as a projection
    leaves them."""
    torch.manual_seed(0)
    tokens = sum(lengths)
    line = torch.randn(1, tokens, heads + 2 * groups, channels).to(dtype).requires_grad_()
    upstream = torch.randn(1, tokens, heads, channels).to(dtype)
    exact = line.detach().double().requires_grad_()
    parts, start = [], 0
    for length in lengths:
        q, k, v = exact[0, start : start + length].split([heads, groups, groups], 1)
        k, v = (each.repeat_interleave(heads // groups, 1) for each in (k, v))
        scores = torch.einsum("ihc,jhc->hij", q, k) * channels**-0.5
        hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
        parts.append(torch.einsum("hij,jhc->ihc", scores.masked_fill(hidden, -torch.inf).softmax(-1), v))
        start += length
    expected = torch.cat(parts)[None]
    expected.backward(upstream.double())
    query, key, value = (each.transpose(1, 2) for each in line.split([heads, groups, groups], 2))
    found, _ = packed_attention.packed_attention(None, query, key, value, None, packed=Layout.of(np.array(lengths)))
    in_blocks = dtype == torch.bfloat16 and kernels.has_blocks() and channels % 32 == 0
    assert type(found.grad_fn).__name__ == f"_{'Block' if in_blocks else 'Causal'}AttentionBackward"
    assert found.dtype == dtype
    finer = DTYPES[dtype] / HALF_A_DIGIT
    torch.testing.assert_close(found.double(), expected.detach(), atol=0.03 * finer, rtol=0.02 * finer)
    found.backward(upstream)
    torch.testing.assert_close(line.grad.double(), exact.grad, atol=0.06 * finer, rtol=0.03 * finer)
    error, size = (line.grad - exact.grad).norm(), exact.grad.norm()
    assert error < 0.01 * finer * size


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sequences_attention_is_its_own_and_a_threads_number_changes_none(processor, dtype):
    """To the bit, both ways: alone or beside others of its own length or not."""
    torch.manual_seed(0)
    line, upstream, before = (
        torch.randn(1, 110, 8, 32).to(dtype),
        torch.randn(1, 110, 4, 32).to(dtype),
        torch.get_num_threads(),
    )

    def both_ways(lengths, tokens, threads=1):
        torch.set_num_threads(threads)
        leaf = line[:, tokens].clone().requires_grad_()
        states = (each.transpose(1, 2) for each in leaf.split([4, 2, 2], 2))
        found, _ = packed_attention.packed_attention(None, *states, None, packed=Layout.of(np.array(lengths)))
        found.backward(upstream[:, tokens].clone())
        torch.set_num_threads(before)
        return found.detach(), leaf.grad

    together, by_two = (both_ways([5, 40, 25, 40], slice(0, 110), threads) for threads in (1, 2))
    assert all(torch.equal(one, other) for one, other in zip(together, by_two, strict=True))
    alone = both_ways([40, 40], [*range(5, 45), *range(70, 110)])
    if dtype == torch.bfloat16 and kernels.has_blocks():  # else products are a library's, of the longest one's size
        alone = both_ways([40], slice(5, 45))
        assert all(torch.equal(one[:, 5:45], other) for one, other in zip(together, alone, strict=True))
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one[:, 5:45].float(), other[:, :40].float(), rtol=2**-7, atol=2**-7)


def without_a_compiler(tmp_path, code, **environment):
    environment = (
        os.environ | {"XDG_CACHE_HOME": str(tmp_path), "PATH": str(tmp_path), "RLHF_RAY_KERNELS": "on"} | environment
    )
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)


SHOW = "from rlhf_ray import kernels; print(kernels.library(), kernels.kernel('multiply'))"


def test_without_a_compiler_torch_does_the_work(tmp_path):
    told = without_a_compiler(tmp_path, SHOW)
    assert told.stdout == "None None\n" and told.stderr == ""


def test_a_compiler_that_fails_is_told_of_and_torch_does_the_work(tmp_path):
    (tmp_path / "cc").write_text("#!/bin/sh\necho 'no such header' >&2\nexit 1\n")
    (tmp_path / "cc").chmod(0o755)
    told = without_a_compiler(tmp_path, SHOW, PATH=f"{tmp_path}:/usr/bin:/bin")
    assert told.stdout == "None None\n"
    assert "no such header" in told.stderr and "torch's operations do their work" in told.stderr
    assert not [*tmp_path.rglob("*.so")]


@pytest.mark.skipif(kernels.library() is None, reason="no C compiler")
def test_they_are_compiled_once_and_can_be_switched_off(tmp_path):
    code = "from rlhf_ray import kernels; print(kernels.library() is not None)"
    here = {"PATH": os.environ["PATH"]}
    assert without_a_compiler(tmp_path, code, **here).stdout == "True\n"
    (made,) = (tmp_path / "rlhf_ray").iterdir()
    when = made.stat().st_mtime_ns
    assert without_a_compiler(tmp_path, code, **here).stdout == "True\n"
    assert made.stat().st_mtime_ns == when
    assert without_a_compiler(tmp_path, code, RLHF_RAY_KERNELS="off", **here).stdout == "False\n"
