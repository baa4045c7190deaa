"""preference_loss and kto_loss as ops and as functions: registration, compilation, messages, packing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rl4llm_fast as rf

pytestmark = pytest.mark.skipif(
    "cpu" not in rf.backends()["preference_loss"], reason="the C++ extension is not built here"
)


def side(B, T):
    logp = -torch.rand(B, T)
    return logp, logp + torch.randn(B, T) / 5, torch.rand(B, T) > 0.3


def test_opcheck():
    ops = torch.ops.rl4llm_fast
    params = torch.tensor([0.1, 1.0, 0.5, 1.0, 2.0], dtype=torch.float64)
    (chosen, ref_chosen, mask_chosen), (rejected, ref_rejected, mask_rejected) = side(3, 7), side(3, 9)
    padded = (chosen, rejected, ref_chosen, ref_rejected, mask_chosen, mask_rejected, None, None, torch.rand(3))
    offsets = torch.tensor([0, 4, 4, 21])
    packed = (
        chosen.flatten(),
        rejected.flatten()[:21],
        None,
        None,
        mask_chosen.flatten(),
        None,
        offsets,
        offsets,
        None,
    )
    alone = (chosen, None, ref_chosen, None, None, None, None, None, torch.tensor([1.0, 0.0, 1.0]))
    for arguments, formula in ((padded, "ipo"), (packed, "orpo"), (alone, "kto")):
        for gradients in (False, True):
            torch.library.opcheck(ops.preference_loss_fwd.default, (*arguments, params, formula, True, gradients))
        _, slopes, *_ = ops.preference_loss_fwd(*arguments, params, formula, True, False)
        backward = (torch.ones(()), slopes, *arguments[:2], *arguments[4:8])
        torch.library.opcheck(ops.preference_loss_bwd.default, backward)


def test_double_backward_raises():
    leaves = [torch.randn(2, 3, requires_grad=True) for _ in range(2)]
    loss, _ = rf.preference_loss(*leaves, kind="simpo", backend="cpu")
    (grad,) = torch.autograd.grad(loss, leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        grad.sum().backward()


@pytest.mark.parametrize("kind", ["dpo", "orpo"])
def test_gradients_of_the_forward_pass_are_handed_on(kind):
    """The last backward pass may own what the forward pass made; others, or those of a scaled loss, make their own."""
    answers = [side(3, 7), side(3, 9)]
    leaves = [logp.requires_grad_() for logp, _, _ in answers]
    refs = [ref for _, ref, _ in answers] if kind == "dpo" else []
    masks = {"mask_chosen": answers[0][2], "mask_rejected": answers[1][2]}

    def loss_of():
        return rf.preference_loss(*leaves, *refs, kind=kind, **masks, backend="cpu")[0]

    loss, other = loss_of(), loss_of()
    last = torch.autograd.grad(loss_of(), leaves)
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves, retain_graph=True)
    for scaled in (torch.autograd.grad(2 * loss, leaves), torch.autograd.grad(2 * other, leaves)):
        for one, again, handed, double in zip(first, second, last, scaled, strict=True):
            assert torch.equal(one, handed)
            assert one.abs().max() > 0
            assert torch.equal(one, again)
            assert torch.equal(double, 2 * one)
    assert first[0].data_ptr() != second[0].data_ptr()


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_compile_without_breaks_or_recompilation(backend):
    graphs = 0

    def count(graph, inputs):
        nonlocal graphs
        graphs += 1
        return graph.forward

    def step(chosen, rejected, refs, mask, beta, smoothing):
        how = {"mask_chosen": mask, "beta": beta, "label_smoothing": smoothing, "backend": backend}
        loss, metrics = rf.preference_loss(chosen, rejected, *refs, **how)
        kto, more = rf.kto_loss(chosen, refs[0], mask[:, 0], beta=beta, kl=smoothing, backend=backend)
        value, _ = rf.value_loss(chosen, refs[0], old_values=refs[0], clip=beta, backend=backend)
        return loss + kto + value + rf.sft_loss(chosen, mask, backend=backend), metrics["margin"] + more["margin"]

    (chosen, ref_chosen, mask), (rejected, ref_rejected, _) = side(3, 7), side(3, 9)
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=count)
    for i in range(4):
        numbers = torch.tensor(0.1 + i / 10), torch.tensor(0.05 * i)
        leaf = chosen.clone().requires_grad_()
        got = compiled(leaf, rejected, (ref_chosen, ref_rejected), mask, *numbers)
        wanted = step(chosen, rejected, (ref_chosen, ref_rejected), mask, *numbers)
        torch.testing.assert_close(got, wanted)
    assert graphs == 1


def test_compile_with_inductor():
    def step(chosen, rejected):
        return rf.preference_loss(chosen, rejected, kind="orpo", backend="cpu")

    leaves = [(-torch.rand(3, 7)).requires_grad_() for _ in range(2)]
    wanted, got = step(*leaves), torch.compile(step, fullgraph=True)(*leaves)
    torch.testing.assert_close(got, wanted)
    grads = [torch.autograd.grad(loss, leaves) for loss in (wanted[0], got[0])]
    torch.testing.assert_close(*grads)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_packed_padded_and_masked_agree(data):
    """The same tokens padded on the right, with holes, or packed without them: one loss, one gradient per token."""
    kind = data.draw(st.sampled_from(["dpo", "ipo", "cpo", "simpo", "orpo"]))
    lengths = data.draw(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=5))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**16)))
    knobs = {"nll": "token"} if kind == "cpo" else {}
    padded, packed = [], []
    arguments = [{}, {}]
    for name, counts in zip(("chosen", "rejected"), zip(*lengths, strict=True), strict=True):
        holes = torch.rand(len(counts), 12, generator=generator).argsort(1) < torch.tensor(counts)[:, None]
        tokens = -torch.rand(len(counts), 12, generator=generator)
        padded.append(tokens.masked_fill(~holes, torch.nan).requires_grad_())
        packed.append(tokens[holes].requires_grad_())
        arguments[0][f"mask_{name}"] = holes
        arguments[1][f"cu_seqlens_{name}"] = torch.nn.functional.pad(torch.tensor(counts).cumsum(0), (1, 0))
    found = []
    for tokens, how in zip((padded, packed), arguments, strict=True):
        refs = [torch.zeros_like(t.detach()) for t in tokens] if kind in ("dpo", "ipo") else []
        loss, metrics = rf.preference_loss(*tokens, *refs, kind=kind, **how, **knobs)
        loss.backward()
        found.append((loss.detach(), metrics, [t.grad for t in tokens]))
    (loss, metrics, grads), (other_loss, other_metrics, other_grads) = found
    torch.testing.assert_close(loss, other_loss)
    torch.testing.assert_close(metrics, other_metrics)
    for name, grad, other in zip(("chosen", "rejected"), grads, other_grads, strict=True):
        torch.testing.assert_close(grad[arguments[0][f"mask_{name}"]], other)


GRAD = torch.tensor(0.1, requires_grad=True)


class TestErrors:
    LOGP = torch.zeros(2, 3)

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"kind": "dpo2"}, ValueError, "kind: wanted one of 'dpo', 'robust'"),
            ({"kind": ["dpo"]}, ValueError, "kind: wanted one of"),
            ({"gamma": 0.5}, ValueError, "gamma: not a knob of kind 'dpo', which has label_smoothing"),
            ({"label_smoothing": None}, ValueError, "label_smoothing: wanted a number"),
            ({"label_smoothing": 1.5}, ValueError, "label_smoothing: wanted a number >= 0"),
            ({"label_smoothing": torch.tensor(1.5)}, ValueError, "label_smoothing: wanted a number >= 0"),
            ({"label_smoothing": "a"}, TypeError, "label_smoothing: wanted a number or a 0-d tensor, got str"),
            ({"label_smoothing": [0.1]}, TypeError, "label_smoothing: wanted a number or a 0-d tensor, got list"),
            ({"label_smoothing": GRAD}, ValueError, "label_smoothing: gets no gradient"),
            ({"average": "no"}, TypeError, "average: wanted a bool, got str"),
            ({"kind": "2d_dpo", "average": True}, ValueError, "average: wanted False for kind '2d_dpo'"),
            ({"kind": "robust", "label_smoothing": 0.5}, ValueError, "< 0.5, got 0.5"),
            ({"beta": -0.1}, ValueError, "beta: wanted a number >= 0, got -0.1"),
            ({"kind": "ipo", "beta": 0.0}, ValueError, "beta: wanted a number > 0"),
            ({"ref_chosen": None}, ValueError, "ref_chosen: kind 'dpo' wants the reference"),
            ({"kind": "cpo"}, ValueError, "ref_chosen: kind 'cpo' wants no reference"),
            ({"kind": "hinge", "prob": torch.ones(2)}, ValueError, "prob: kind 'hinge' has none"),
            ({"prob": torch.ones(2), "label_smoothing": 0.1}, ValueError, "label_smoothing, prob"),
            ({"prob": torch.ones(3)}, ValueError, "prob: wanted the shape \\(2,\\)"),
            ({"prob": torch.tensor([0.5, 1.5])}, ValueError, r"prob: wanted .*, got 1.5 at position \(1,\)"),
            ({"prob": torch.tensor([0.5, float("nan")])}, ValueError, "prob: wanted probabilities"),
            ({"logp_rejected": torch.zeros(3, 3)}, ValueError, "ref_rejected"),
            ({"mask_chosen": torch.ones(2, 3)}, TypeError, "mask_chosen: wanted a bool"),
            ({"mask_rejected": torch.ones(2, 2, dtype=torch.bool)}, ValueError, "mask_rejected: wanted the shape"),
            ({"cu_seqlens_chosen": torch.tensor([0, 3])}, ValueError, "logp_chosen: wanted packed tokens"),
            ({"logp_chosen": torch.zeros(2, 3, dtype=torch.long)}, TypeError, "logp_chosen: wanted float32"),
            ({"logp_chosen": torch.zeros(2, 3, 1)}, ValueError, "logp_chosen: wanted \\(B, T\\)"),
            ({"kind": "2d_dpo"}, ValueError, "segments_chosen: kind '2d_dpo' wants"),
            ({"backend": "nonsense"}, ValueError, "backend: wanted one of"),
        ],
    )
    def test_preference_loss(self, change, error, message):
        names = ("logp_chosen", "logp_rejected", "ref_chosen", "ref_rejected")
        with pytest.raises(error, match=message):
            rf.preference_loss(**(dict.fromkeys(names, self.LOGP) | change))

    def test_forgotten_offsets(self):
        offsets = torch.tensor([0, 3, 6])
        with pytest.raises(ValueError, match=r"wanted 2 answers.*got 6 .*\(6,\); packed tokens want their cu_seqlens"):
            rf.preference_loss(*[torch.zeros(6)] * 2, kind="simpo", cu_seqlens_chosen=offsets)

    def test_segments(self):
        good = torch.tensor([[[0, 2]], [[1, 3]]])
        for bad, message in (
            (torch.tensor([[[0, 2]], [[1, 4]]]), r"first <= end <= 3.*got \(1, 4\) at position \(1, 0\)"),
            (torch.tensor([[[0, 2]], [[-1, -1]]]), "segments_rejected: wanted the segments"),
            (good[:1], r"segments_rejected: wanted \(2, K, 2\)"),
        ):
            with pytest.raises(ValueError, match=message):
                rf.preference_loss(*[self.LOGP] * 4, kind="2d_dpo", segments_chosen=good, segments_rejected=bad)

    def test_kto_and_rewards(self):
        with pytest.raises(ValueError, match="desirable: wanted the shape"):
            rf.kto_loss(self.LOGP, self.LOGP, torch.ones(3, dtype=torch.bool))
        with pytest.raises(TypeError, match="desirable: wanted a bool"):
            rf.kto_loss(self.LOGP, self.LOGP, torch.ones(2))
        with pytest.raises(ValueError, match="mask: wanted None"):
            rf.kto_loss(
                self.LOGP[0], self.LOGP[0], torch.ones(3, dtype=torch.bool), mask=torch.ones(3, dtype=torch.bool)
            )
        with pytest.raises(ValueError, match="chosen: wanted one reward per answer"):
            rf.reward_model_loss(self.LOGP, self.LOGP)
        with pytest.raises(ValueError, match="margin: wanted the shape"):
            rf.reward_model_loss(self.LOGP[0], self.LOGP[0], margin=torch.ones(2))
        for margin, message in (([1.0, 2.0], "wanted .* got list"), ("1", "wanted .* got str"), (GRAD, "gets no grad")):
            with pytest.raises((TypeError, ValueError), match=f"^margin: {message}"):
                rf.reward_model_loss(self.LOGP[0], self.LOGP[0], margin=margin)
        for name in ("kl", "lambda_d", "lambda_u"):
            for value in (-0.1, torch.tensor(-0.1)):
                with pytest.raises(ValueError, match=f"^{name}: wanted a number >= 0"):
                    rf.kto_loss(self.LOGP, self.LOGP, torch.ones(2, dtype=torch.bool), **{name: value})
        with pytest.raises(TypeError, match="ranks: wanted an integer tensor"):
            rf.ranked_reward_loss(torch.zeros(2), torch.zeros(2), torch.zeros(2, dtype=torch.long))
        with pytest.raises(ValueError, match="prompt_ids: wanted the shape"):
            rf.ranked_reward_loss(torch.zeros(2), torch.zeros(2, dtype=torch.long), torch.zeros(3, dtype=torch.long))
