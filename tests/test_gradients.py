"""One pass against autograd's K passes; combinations against theory."""

import pytest
import torch
from conftest import moved
from hypothesis import example, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from bbkit import CannotRun, InputError, combination, config, gradients, models
from bbkit.gradients import Capture, capability_gradients, combine, watch


def tiny(seed=0, rank=4, dropout=0.0, checkpointing=None, targets="all-linear"):
    """A random Llama with LoRA on all linear layers, B not 0, in training mode."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 31}
    lora = LoraConfig(r=rank, lora_alpha=8, lora_dropout=dropout, target_modules=targets)
    model = get_peft_model(LlamaForCausalLM(LlamaConfig(**sizes)), lora)
    moved(model, 0.3, seed)
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    return model.train()


def doubled(model):
    """In float64 throughout: transformers' own norm computes in float32 whatever its weights are.

    In float32 either way of the example below is 8e-6 from this, which is no error of a method.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, LlamaRMSNorm):
            model.set_submodule(name, nn.RMSNorm(len(module.weight), module.variance_epsilon))
            model.get_submodule(name).weight = module.weight
    return model.double()


def batch(seed, sequences, side="right", vocabulary=31, length=9):
    """Token ids and mask; sequence i is padded by i tokens on one side."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocabulary, (sequences, length), generator=generator)
    mask = torch.ones_like(ids)
    for i in range(1, sequences):
        mask[i, -i % length :] = 0
    return ids, mask.flip(1) if side == "left" else mask


def terms(model, ids, mask):
    """ℓ_i: mean negative log-likelihood of each sequence's own tokens, (N,)."""
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss = nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    return (loss * mask[:, 1:]).sum(1) / mask[:, 1:].sum(1).clamp(min=1)


def separate(model, batches, advantages, seed=7):
    """The oracle: one whole forward and backward pass per capability."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for k in range(advantages[0].shape[1]):
        torch.manual_seed(seed)
        for one, weights in zip(batches, advantages, strict=True):
            (weights[:, k] * terms(model, *one)).sum().backward()
        rows.append(torch.cat([p.grad.flatten() for p in parameters]).clone())
        for p in parameters:
            p.grad = None
    return torch.stack(rows)


def one_pass(model, batches, advantages, seed=7):
    torch.manual_seed(seed)
    with capability_gradients(model, advantages[0]) as capture:
        for one, weights in zip(batches, advantages, strict=True):
            capture.next(weights)
            terms(model, *one).sum().backward()
    model.zero_grad()
    return capture


def error(found, wanted):
    return ((found - wanted).norm() / wanted.norm()).item()


@example(254, 1, 3, 1, 1, "left", 0.0, None)
@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    rank=st.integers(1, 8),
    sequences=st.integers(1, 4),
    capabilities=st.integers(1, 5),
    passes=st.integers(1, 3),
    side=st.sampled_from(["left", "right"]),
    dropout=st.sampled_from([0.0, 0.3]),
    checkpointing=st.sampled_from([None, True, False]),
)
def test_one_pass_equals_autograd(
    seed, rank, sequences, capabilities, passes, side, dropout, checkpointing
):
    model = doubled(tiny(seed, rank, dropout, checkpointing))
    batches = [batch(seed + i, sequences, side) for i in range(passes)]
    advantages = [torch.randn(sequences, capabilities).double() for _ in batches]
    capture = one_pass(model, batches, advantages)
    assert not capture.missed
    assert error(capture.gradients, separate(model, batches, advantages)) <= 1e-12


def test_what_is_captured_does_not_reach_grad():
    model = tiny()
    with capability_gradients(model, torch.randn(3, 2)) as capture:
        terms(model, *batch(0, 3)).sum().backward()
    assert capture.gradients.any(1).all()
    assert all(p.grad is None for p in model.parameters())
    assert not any("forward" in vars(m) for m in model.modules())


def test_one_pass_in_bfloat16():
    model, data, weights = tiny(rank=8), [batch(0, 4)], [torch.randn(4, 3)]
    with torch.autocast("cpu", torch.bfloat16):
        found = one_pass(model, data, weights).gradients
        wanted = separate(model, data, weights)
    assert error(found, wanted) <= 2e-2
    assert nn.functional.cosine_similarity(found, wanted).min() >= 0.999


def test_one_pass_under_nf4():
    chosen = config.load("pocket", None, ["model.quantization=nf4", "model.lora_rank=8"]).model
    base, _ = models.load(chosen, say=lambda line: None)
    model = moved(models.add_lora(base, chosen, 0)).train()
    data, weights = [batch(0, 3, vocabulary=4000, length=20)], [torch.randn(3, 4)]
    found = one_pass(model, data, weights).gradients
    assert error(found, separate(model, data, weights)) <= 1e-5


def test_a_bypassed_matrix_is_seen_and_replay_agrees():
    """A stand-in for fused kernels: the forward reads the LoRA weights past their modules."""

    model, data, weights = tiny(), batch(0, 3), torch.randn(3, 2)
    matrix = model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"]
    matrix.forward = lambda x: x @ matrix.weight.T
    with capability_gradients(model, weights) as capture:
        terms(model, *data).sum().backward()
    assert len(capture.missed) == 1 and "layers.0.self_attn.q_proj" in capture.missed[0]
    with pytest.raises(CannotRun, match=r"bypass the capture, first .*q_proj"):
        _ = capture.gradients
    model.zero_grad()
    replayed = Capture(model, 2)
    for k in range(2):
        (weights[:, k] * terms(model, *data)).sum().backward()
        replayed.take(k)
    assert replayed.engine == "replay"
    assert error(replayed.gradients, separate(model, [data], [weights])) <= 1e-6


def test_one_bypassed_micro_batch_among_seen_ones_counts_as_missed():
    model = nn.Linear(3, 2)
    for flattened in (0, 1, 2):
        with capability_gradients(model, torch.ones(4, 2)) as capture:
            for i in range(3):
                capture.next(torch.ones(4, 2))
                model(torch.randn(12 if i == flattened else 4, 3)).sum().backward()
        assert capture.missed == ["weight", "bias"], flattened


def full(tie=False):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 31}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": tie}
    return LlamaForCausalLM(LlamaConfig(**sizes))


def adapted(tie=False, **options):
    model = get_peft_model(full(tie), LoraConfig(r=4, task_type="CAUSAL_LM", **options))
    for name, parameter in model.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            nn.init.normal_(parameter, std=0.3)
    return model


EVERY, QUERY = {"target_modules": "all-linear"}, {"target_modules": ["q_proj"]}
TRAINED = {
    "all weights": full,
    "all weights, tied": lambda: full(tie=True),
    "DoRA": lambda: adapted(use_dora=True, lora_dropout=0.3, **EVERY),
    "LoRA on embeddings": lambda: adapted(target_modules=["embed_tokens", "q_proj"]),
    "some tokens": lambda: adapted(trainable_token_indices=[1, 2, 3], **QUERY),
    "some tokens, tied": lambda: adapted(tie=True, trainable_token_indices=[1, 2, 3], **QUERY),
    "norms and head saved": lambda: adapted(modules_to_save=["norm", "lm_head"], **QUERY),
}


@pytest.mark.parametrize("checkpointing", [None, False])
@pytest.mark.parametrize("kind", TRAINED)
def test_one_pass_of_whatever_trains(kind, checkpointing):
    model = TRAINED[kind]().train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    batches, advantages = [batch(0, 4), batch(1, 4, "left")], [torch.randn(4, 3), torch.randn(4, 3)]
    capture = one_pass(model, batches, advantages)
    assert not capture.missed
    assert error(capture.gradients, separate(model, batches, advantages)) <= 1e-5


class Odd(nn.Module):
    """Weights of its own, random numbers within, and an output in a tuple where asked for."""

    def __init__(self, pair=False):
        super().__init__()
        self.weight, self.pair = nn.Parameter(torch.randn(3)), pair

    def forward(self, x):
        out = nn.functional.dropout(x * self.weight, 0.5, self.training)
        return (out, 0) if self.pair else out


def test_a_module_that_draws_draws_the_same_once_more():
    x, weights = torch.randn(4, 3), torch.randn(4, 2)
    model = Odd()
    rows = []
    for column in weights.T:
        torch.manual_seed(7)
        rows.append(torch.autograd.grad((model(x) * column[:, None]).sum(), model.weight)[0])
    torch.manual_seed(7)
    with capability_gradients(model, weights) as capture:
        model(x).sum().backward()
    assert error(capture.gradients, torch.stack(rows)) <= 1e-6


@pytest.mark.parametrize("bfloat16", [False, True])
def test_a_module_runs_again_in_the_precision_of_the_first_time(bfloat16):
    model, x, weights = full(), batch(0, 4), torch.randn(4, 3)
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        found = one_pass(model, [x], [weights]).gradients
        wanted = separate(model, [x], [weights])
    assert error(found, wanted) <= (2e-2 if bfloat16 else 1e-5)


def test_what_gives_no_tensor_or_no_row_a_sequence_counts_as_missed():
    model = Odd(pair=True)
    with capability_gradients(model, torch.ones(4, 2)) as capture:
        model(torch.randn(4, 3))[0].sum().backward()
    assert capture.missed == ["weight"]
    places = nn.Embedding(9, 3)  # of positions: one row, which all sequences share
    with capability_gradients(places, torch.ones(4, 2)) as capture:
        (places(torch.arange(9)[None]) + torch.randn(4, 9, 3)).sum().backward()
    assert capture.missed == ["weight"]


def test_a_weight_used_a_second_time_past_its_layer_counts_as_missed():
    model, x = torch.nn.Linear(4, 4), torch.randn(3, 4)
    with capability_gradients(model, torch.randn(3, 2)) as capture:
        (model(x) @ model.weight).sum().backward()
    assert capture.missed == ["weight"]


def test_flattened_sequences_count_as_missed():
    model = nn.Linear(3, 2)
    with capability_gradients(model, torch.ones(4, 2)) as capture:
        model(torch.randn(12, 3)).sum().backward()
    assert capture.missed == ["weight", "bias"]


def test_shapes_are_checked():
    model = nn.Linear(3, 2)
    with pytest.raises(InputError, match=r"\(3,\), not \(N, 2\)"):
        Capture(model, 2).next(torch.ones(3))
    with pytest.raises(InputError, match="no trainable parameter"):
        Capture(model.requires_grad_(False), 2)


def test_parts_add_up_and_put_writes_the_direction():
    model, weights = tiny(), [torch.randn(3, 3)]
    capture = one_pass(model, [batch(0, 3)], weights)
    parts = capture.by(lambda name: name.split(".")[4])
    assert set(parts) == {"0", "1"}
    assert torch.allclose(sum(parts.values()), capture.gramian, rtol=1e-4)
    coefficients = torch.tensor([0.5, -1.0, 2.0])
    capture.put(coefficients)
    written = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
    assert torch.allclose(written, coefficients @ capture.gradients, atol=1e-6)


def test_halves_add_up_to_the_whole():
    model, data, weights = tiny(), [batch(0, 4)], torch.randn(4, 2)
    whole = one_pass(model, data, [weights]).gradients
    both = one_pass(model, data, [gradients.halves(weights)])
    assert torch.allclose(both.gradients[:2] + both.gradients[2:], whole, atol=1e-6)
    assert gradients.reliability(both.gramian).shape == (2,)


def test_identity_advantages_give_the_gram_matrix_of_sequences():
    model, data, weights = tiny(), [batch(0, 4)], torch.randn(4, 2)
    gram = one_pass(model, data, [torch.eye(4)]).gramian
    wanted = one_pass(model, data, [weights]).gramian
    assert torch.allclose(weights.double().T @ gram @ weights.double(), wanted, rtol=1e-4)


def test_a_longer_capture_sees_several_contexts():
    model, weights = tiny(), torch.randn(2, 2)
    data = [batch(0, 2), batch(1, 2)]
    capture = Capture(model, 2)
    for one in data:
        with watch(model, capture):
            capture.next(weights)
            terms(model, *one).sum().backward()
    assert error(capture.gradients, one_pass(model, data, [weights] * 2).gradients) <= 1e-6


# --- combinations -----------------------------------------------------------------------------


def rows(seed, count=3, width=6):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("method", ["dual_cone", "upgrad"])
def test_cone_steps_oppose_no_objective(method):
    for seed in range(1000):
        g = rows(seed, 2 + seed % 4, 3 + seed % 7) * 10.0 ** (seed % 9 - 6)
        g[-1] *= 10.0 ** -(seed % 5)  # a short one beside long ones counts as much
        preference = torch.rand(len(g), generator=torch.Generator().manual_seed(seed)) + 0.01
        preference[0] *= seed % 3 > 0  # now and then one that only constrains
        step = combine(g @ g.T, method, preference) @ g
        along = g @ step / (g.norm(dim=1) * (preference.double() @ g.norm(dim=1)))
        assert along.min() >= -1e-6, seed


@pytest.mark.parametrize(
    "method", [m for m in combination.COMBINATIONS if m not in ("random", "mgda")]
)
def test_without_conflict_nothing_is_bent(method):
    g = torch.eye(3, dtype=torch.float64)
    assert torch.allclose(
        combine(g, method, [0.5, 0.3, 0.2]), torch.tensor([0.5, 0.3, 0.2]).double()
    )


@pytest.mark.parametrize("method", combination.COMBINATIONS)
def test_rounded_gramians_of_parallel_rows_are_borne(method):
    for seed in range(50):
        g = rows(seed, 2 + seed % 4, 2).float()
        g[0] = -0.3 * g[1]
        assert torch.isfinite(combine(g @ g.T, method)).all(), seed


def angle(degrees, length=1.0):
    """Gramian of a unit gradient and one of that length at that angle."""
    turn = torch.tensor(degrees).deg2rad()
    g = torch.tensor([[1.0, 0.0], [length * turn.cos(), length * turn.sin()]])
    return g.double(), (g @ g.T).double()


def test_known_angles():
    g, gram = angle(120.0)
    half = torch.tensor([0.5, 0.5])
    # PCGrad (arXiv 2001.06782, algorithm 1): each less its part along the other: c = 1 + 1/2.
    assert torch.allclose(combine(gram, "pcgrad", half), torch.tensor([0.75, 0.75]).double())
    # UPGrad with two conflicting gradients does the same.
    assert torch.allclose(combine(gram, "upgrad", half), torch.tensor([0.75, 0.75]).double())
    # Dual cone: the mean opposes neither, so it stays.
    assert torch.allclose(combine(gram, "dual_cone", half), half.double())
    # MGDA of equal lengths: the middle of the segment.
    assert torch.allclose(combine(gram, "mgda", half), half.double(), atol=1e-4)
    # Dual cone with preference for the first alone: it less its part along the second.
    step = combine(gram, "dual_cone", [1.0, 0.0]) @ g
    assert abs(step @ g[1]) < 1e-7 and abs(step @ g[0] - 0.75) < 1e-7


def test_mgda_of_unequal_lengths_is_the_nearest_point_to_zero():
    _, gram = angle(90.0, length=2.0)
    assert torch.allclose(
        combine(gram, "mgda", [0.5, 0.5]), torch.tensor([0.8, 0.2]).double(), atol=1e-3
    )


def test_aligned_mtl_makes_the_gradients_orthogonal_and_of_one_length():
    """arXiv 2305.19000, section 3.2: the nearest matrix whose singular values are all the least."""
    g = rows(3)
    parts = torch.stack(
        [combine(g @ g.T, "aligned_mtl", e) for e in (1e-9 + torch.eye(3)).double()]
    )
    aligned = parts @ g
    wanted = torch.linalg.svdvals(g)[-1] ** 2 * torch.eye(3, dtype=torch.float64)
    assert torch.allclose(aligned @ aligned.T, wanted, atol=1e-6)


@pytest.mark.parametrize("method", [m for m in combination.COMBINATIONS if m != "random"])
def test_scale_and_order_do_not_matter(method):
    g = rows(5, 2)
    preference = torch.tensor([0.7, 0.3]).double()
    found = combine(g @ g.T, method, preference)
    assert torch.allclose(combine(g @ g.T * 1e-14, method, preference), found, atol=1e-6)
    turned = combine((g @ g.T).flip(0, 1), method, preference.flip(0)).flip(0)
    assert torch.allclose(turned, found, atol=1e-6)


@pytest.mark.parametrize("method", combination.COMBINATIONS)
def test_absent_gradients_take_no_part(method):
    g = rows(6)
    g[1] = 0
    found = combine(g @ g.T, method, [0.2, 0.5, 0.3])
    assert found[1] == 0.5 and (found @ g).norm() > 1e-3
    assert torch.equal(
        combine(torch.zeros(3, 3), method, [0.2, 0.5, 0.3]), torch.tensor([0.2, 0.5, 0.3])
    )
    broken = torch.full((2, 2), float("nan"))
    assert torch.equal(combine(broken, method, [0.4, 0.6]), torch.tensor([0.4, 0.6]))


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("method", [m for m in combination.COMBINATIONS if m != "random"])
def test_descent_on_quadratics_ends_where_theory_says(count, method):
    """f_k = |x - m_k|²/2: the Pareto set is the hull of the m_k.

    `sum` ends in their preferred mean. A cone method ends where its path meets the Pareto set,
    which may be elsewhere, and no f_k rises on the way but by the second order of the step.
    """
    centres = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0]]).double()[:count]
    preference = torch.tensor([0.5, 0.3, 0.2]).double()[:count]
    preference /= preference.sum()
    x = torch.tensor([3.0, 2.5]).double()
    for step in range(200 if method == "mgda" else 600):  # TorchJD's MGDA is slow
        g, rate = x - centres, 0.5 / (1 + step / 20)
        move = rate * combine(g @ g.T, method, preference) @ g
        before, x = g.square().sum(1) / 2, x - move
        if method in ("dual_cone", "upgrad"):
            risen = (x - centres).square().sum(1) / 2 - before
            assert risen.max() <= move.square().sum() / 2 + 1e-7
    weights = torch.linalg.lstsq(
        torch.cat([centres.T, torch.ones(1, count).double()]), torch.cat([x, torch.ones(1)])
    ).solution
    if method == "sum":
        assert torch.allclose(x, preference @ centres, atol=1e-3)
    assert weights.min() >= -1e-2 and torch.allclose(weights @ centres, x, atol=1e-2)


def test_combine_refuses_nonsense():
    with pytest.raises(InputError, match="combination 'pcgard': use one of sum, pcgrad"):
        combine(torch.eye(2), "pcgard")
    with pytest.raises(InputError, match="2 weights of 0 or more"):
        combine(torch.eye(2), "sum", [1.0, -1.0])


def test_adam_scale_is_adams_own():
    """With beta1 = 0, a step changes the parameters by rate times scale times gradient."""
    model = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1, betas=(0.0, 0.9))
    assert combination.adam_scale(optimizer, model.parameters()) is None
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    model(torch.randn(4, 3)).square().sum().backward()
    grad = torch.cat([p.grad.flatten() for p in model.parameters()])
    optimizer.step()
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    scale = combination.adam_scale(optimizer, model.parameters())
    assert torch.allclose(before - after, 0.1 * scale * grad, atol=1e-6)
