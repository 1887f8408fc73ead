"""The network against OpenAI's numbers, transformers' code, and itself."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import ImageGPTConfig as TheirConfig
from transformers import ImageGPTForCausalImageModeling

from lightning_igpt.config import PRESETS, ImageGPTConfig
from lightning_igpt.model import ImageGPT, KVCache, Normed, QuickGELU, RMSNorm
from lightning_igpt.objectives import masked_pixel_loss, next_pixel_loss
from lightning_igpt.weights import huggingface, openai
from tests.networks import SMALL, SMALL_BERT, random_network, random_tokens

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize(
    ("preset", "count"),
    [("igpt_s", 76_571_648), ("igpt_m", 455_157_760), ("igpt_l", 1_362_250_752), ("igpt_xl", 6_801_438_720)],
)
def test_presets_have_the_published_number_of_parameters(preset, count):
    with torch.device("meta"):
        network = ImageGPT(PRESETS[preset])
    assert sum(parameter.numel() for parameter in network.parameters()) == count


def test_initial_values_are_the_published_ones():
    torch.manual_seed(0)
    network = ImageGPT(ImageGPTConfig(n_layer=4, n_head=4, n_embd=256, vocab_size=512, image_size=32))
    attention, mlp = network.h[0].attn, network.h[0].mlp
    expected = [
        (network.wte.weight, 0.02),
        (network.wpe.weight, 0.01),
        (network.sos, 0.02),
        (attention.c_attn.weight, 1 / math.sqrt(256)),
        (attention.c_proj.weight, 1 / math.sqrt(256 * 4)),
        (mlp.c_fc.weight, 0.02),
        (mlp.c_proj.weight, 0.02),
    ]
    for tensor, std in expected:
        assert tensor.std().item() == pytest.approx(std, rel=4 / math.sqrt(2 * tensor.numel()))
    assert network.lm_head.weight.count_nonzero() == 0
    assert network.lm_head.weight is not network.wte.weight
    assert all((norm.weight == 1).all() for norm in network.modules() if isinstance(norm, RMSNorm))


def test_sos_takes_position_zero_and_the_last_token_is_never_an_input():
    network, tokens = random_network(), random_tokens()
    logits = network(tokens)
    assert logits.shape == (2, 16, 20)
    changed = tokens.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 20
    torch.testing.assert_close(network(changed), logits, rtol=0, atol=0)
    with torch.no_grad():
        network.sos.add_(1.0)
    assert (network(tokens)[:, 0] - logits[:, 0]).abs().max() > 1e-3


def test_causality():
    network, tokens = random_network(), random_tokens()
    logits = network(tokens)
    for position in range(15):
        changed = tokens.clone()
        changed[:, position] = (changed[:, position] + 1) % 20
        moved = (network(changed) - logits).abs().amax((0, 2)) > 0
        assert not moved[: position + 1].any(), f"logits at or before pixel {position} saw it"
        assert moved[position + 1 :].all()


def test_bert_sees_both_sides_and_hides_what_is_masked():
    network, tokens = random_network(SMALL_BERT), random_tokens()
    masked = torch.zeros(2, 16, dtype=torch.bool)
    masked[:, 5] = True
    logits = network(tokens, masked=masked)
    hidden_changed, later_changed = tokens.clone(), tokens.clone()
    hidden_changed[:, 5] = (hidden_changed[:, 5] + 1) % 20
    later_changed[:, 12] = (later_changed[:, 12] + 1) % 20
    torch.testing.assert_close(network(hidden_changed, masked=masked), logits, rtol=0, atol=0)
    assert (network(later_changed, masked=masked) - logits)[:, 5].abs().max() > 1e-4
    assert network.sos is None
    with pytest.raises(ValueError, match="masked="):
        network(tokens)


def golden(kind):
    """A network with the weights of OpenAI's own code, and the arrays that code computed with them."""
    arrays = np.load(GOLDEN / f"openai_tf_{kind}.npz", allow_pickle=False)
    names = [name for name in arrays if name.startswith("weight:") and not name.endswith("_power")]
    values = {name.removeprefix("weight:"): torch.from_numpy(arrays[name]) for name in names}
    shapes = {name: tuple(value.shape) for name, value in values.items()}
    return openai.from_variables(shapes, values.__getitem__, "golden"), arrays


@pytest.mark.parametrize("kind", ["ar", "bert"])
def test_logits_losses_and_gradients_equal_openais(kind):
    network, expected = golden(kind)
    tokens, labels = torch.from_numpy(expected["tokens"]), torch.from_numpy(expected["labels"])
    masked = torch.from_numpy(expected["keep_uniform"]) <= 0.15 if kind == "bert" else None
    wclf = torch.from_numpy(expected["wclf"]).requires_grad_()
    hidden = network.hidden(tokens, masked=masked)
    logits = network.lm_head(hidden)
    loss = next_pixel_loss(logits, tokens) if masked is None else masked_pixel_loss(logits, tokens, masked)
    classification = F.cross_entropy(hidden.mean(1) @ wclf.T, labels)
    np.testing.assert_allclose(logits.detach(), expected["gen_logits"], rtol=1e-4, atol=1e-5)
    assert loss.item() == pytest.approx(expected["gen_loss"].item(), rel=1e-5)
    assert classification.item() == pytest.approx(expected["clf_loss"].item(), rel=1e-5)
    (loss + classification).backward()
    np.testing.assert_allclose(wclf.grad, expected["grad:clf/wclf"], rtol=1e-3, atol=1e-5)
    checked = 0
    for name, gradient in their_gradients(network).items():
        np.testing.assert_allclose(gradient, expected[f"grad:{name}"], rtol=1e-3, atol=1e-5, err_msg=name)
        checked += 1
    assert checked == len([name for name in expected if name.startswith("grad:")]) - 1


def their_gradients(network):
    """Our gradients under OpenAI's names and shapes."""
    heads, width = network.config.n_head, network.config.n_embd
    found = {"wtet": network.lm_head.weight.grad, "ln_f/g": network.ln_f.weight.grad}
    if network.sos is not None:
        found["sos"] = network.sos.grad
    for i, block in enumerate(network.h):
        found[f"h{i}/ln_1/g"], found[f"h{i}/ln_2/g"] = block.ln_1.weight.grad, block.ln_2.weight.grad
        for part, gradient in zip("qkv", block.attn.c_attn.weight.grad.chunk(3), strict=True):
            found[f"h{i}/attn/{part}_proj"] = gradient.reshape(heads, width // heads, width)
        found[f"h{i}/attn/c_proj"] = block.attn.c_proj.weight.grad.T.reshape(heads, width // heads, width)
        found[f"h{i}/mlp/c_fc/w"] = block.mlp.c_fc.weight.grad.T
        found[f"h{i}/mlp/c_proj/w"] = block.mlp.c_proj.weight.grad.T
    return found


def their_model(dtype, **changes):
    torch.manual_seed(0)
    config = TheirConfig(
        vocab_size=21, n_positions=16, n_embd=32, n_layer=3, n_head=4,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **changes,
    )  # fmt: skip
    model = ImageGPTForCausalImageModeling(config).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith("bias"):
                parameter.normal_(std=0.2)
    return model


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("n_inner", [None, 48])
@pytest.mark.parametrize("biased", [False, True])
def test_logits_equal_transformers(dtype, tolerance, n_inner, biased):
    theirs = their_model(dtype, n_inner=n_inner)
    if biased:
        with torch.no_grad():
            for name, parameter in theirs.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_(std=0.2)
    # The loader reads float32; in float64 the same values are compared at higher precision.
    ours = huggingface.from_state_dict(theirs.state_dict(), theirs.config.to_dict(), "theirs").to(dtype).eval()
    theirs.load_state_dict({key: value.float().to(dtype) for key, value in theirs.state_dict().items()})
    assert ours.config.bias is biased
    tokens = random_tokens()
    with_sos = torch.cat([torch.full((2, 1), 20), tokens[:, :-1]], 1)
    expected = theirs(with_sos).logits
    scale = expected.abs().max()
    torch.testing.assert_close(ours(tokens) / scale, expected / scale, rtol=0, atol=tolerance)


def test_taps_equal_transformers_normed_hidden_states():
    theirs = their_model(torch.float64)
    theirs.load_state_dict({key: value.float().double() for key, value in theirs.state_dict().items()})
    ours = huggingface.from_state_dict(theirs.state_dict(), theirs.config.to_dict(), "theirs").double().eval()
    tokens = random_tokens()
    states = theirs(
        torch.cat([torch.full((2, 1), 20), tokens[:, :-1]], 1), output_hidden_states=True
    ).hidden_states  # fmt: skip
    expected = [block.ln_1(state).mean(1) for block, state in zip(theirs.transformer.h, states[:-1], strict=True)]
    expected.append(states[-1].mean(1))
    taps = ours.features(tokens, [3, 0, 1, 2])
    torch.testing.assert_close(taps, torch.stack([expected[i] for i in (3, 0, 1, 2)], 1), rtol=0, atol=1e-10)


def test_features_stop_at_the_deepest_layer_asked_for():
    network, tokens = random_network(), random_tokens()
    network.h[1].forward = None  # would fail if it were called
    assert network.features(tokens, [0, 1]).shape == (2, 2, 32)
    with pytest.raises(ValueError, match="from 0 to 3"):
        network.features(tokens, [4])
    with pytest.raises(ValueError, match="from 0 to 3"):
        network.features(tokens, [])


@pytest.mark.parametrize("prompt", [0, 1, 7, 15])
def test_cached_logits_equal_uncached_at_every_position(prompt):
    network, tokens = random_network(dtype=torch.float64), random_tokens()
    expected = network(tokens)
    cache = KVCache(SMALL, 2, dtype=torch.float64)
    parts = [network(tokens[:, :prompt], cache=cache)]
    for position in range(prompt, 15):
        parts.append(network(tokens[:, position : position + 1], cache=cache))
    assert int(cache.position) == cache.length == 16
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="17 tokens"):
        network(tokens[:, -1:], cache=cache)


def test_quick_gelu_and_its_gradient():
    x = torch.linspace(-6, 6, 50, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(QuickGELU.apply(x), x * torch.sigmoid(1.702 * x), rtol=0, atol=1e-14)
    assert torch.autograd.gradcheck(QuickGELU.apply, x)
    assert torch.autograd.gradgradcheck(QuickGELU.apply, x)
    before = x.detach().clone()
    QuickGELU.apply(x)
    assert torch.equal(x, before)


def test_the_norm_in_training_and_its_gradients():
    """Normed against autograd through torch's own norm, also where backward runs inside autocast."""
    x = torch.randn(3, 2, 5, dtype=torch.float64, requires_grad=True)
    gain = torch.randn(5, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(Normed.apply(x, gain), F.rms_norm(x, (5,), gain, 1e-5), rtol=0, atol=1e-14)
    assert torch.autograd.gradcheck(Normed.apply, (x, gain))
    assert torch.autograd.gradgradcheck(Normed.apply, (x, gain))
    x, norm = torch.randn(2, 1000, 96, requires_grad=True), RMSNorm(96)
    weights = torch.randn_like(x)
    with torch.autocast("cpu", torch.bfloat16):
        gradients = torch.autograd.grad((norm(x) * weights).sum(), (x, norm.weight))
    exact = (x.detach().double().requires_grad_(), norm.weight.detach().double().requires_grad_())
    expected = torch.autograd.grad((F.rms_norm(exact[0], (96,), exact[1], 1e-5) * weights).sum(), exact)
    for gradient, value in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient.double(), value, rtol=1e-5, atol=1e-5)


def test_no_attention_matrix_is_kept_for_backward():
    """Saved bytes per block stay linear in T: at T = 1024 one T x T matrix would be larger than all else."""
    config = ImageGPTConfig(n_layer=1, n_head=4, n_embd=32, vocab_size=8, image_size=32)
    network, saved = random_network(config), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        network(random_tokens(config, batch=1)).sum().backward()
    assert max(saved) < 1024 * 1024
