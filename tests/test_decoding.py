import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_igpt import decoding
from lightning_igpt.config import ImageGPTConfig
from lightning_igpt.decoding import Decoder
from lightning_igpt.model import KVCache
from lightning_igpt.sampling import complete, inpaint, score
from tests.networks import SMALL, SMALL_BERT, random_network, random_tokens

WIDE = ImageGPTConfig(n_layer=2, n_head=2, n_embd=64, vocab_size=32, image_size=8)
BIASED = dataclasses.replace(SMALL, bias=True)


def stepped(network, tokens, prompt, precision="full"):
    """Logits (B, T - prompt, K) of all pixels after the prompt, one step each."""
    decoder = Decoder(network, len(tokens), precision)
    with torch.no_grad():
        logits = [decoder.start(tokens[:, :prompt])]
        logits += [decoder.step(tokens[:, t : t + 1]).clone() for t in range(prompt, tokens.shape[1] - 1)]
    assert decoder.cache.length == int(decoder.cache.position) == tokens.shape[1]
    return torch.stack(logits, 1)


@pytest.mark.parametrize("config", [SMALL, BIASED, WIDE], ids=["small", "with biases", "wide"])
@pytest.mark.parametrize("prompt", [0, 1, 9])
@pytest.mark.parametrize("batch", [1, 3, 6])
def test_steps_give_the_logits_of_the_whole_picture(config, prompt, batch):
    network, tokens = random_network(config, dtype=torch.float64), random_tokens(config, batch)
    expected = network(tokens)[:, prompt:].detach()
    torch.testing.assert_close(stepped(network, tokens, prompt), expected, rtol=0, atol=1e-11)
    single = stepped(network.float(), tokens, prompt)
    torch.testing.assert_close(single.double(), expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


@pytest.fixture(params=[True, False], ids=["float16", "bfloat16"])
def weights_of_half(request, monkeypatch):
    """The type of weights in half precision: float16 with FBGEMM, else bfloat16."""
    if request.param and not decoding.reads_float16():
        pytest.skip("this torch has no FBGEMM")
    monkeypatch.setattr(decoding, "reads_float16", lambda: request.param)
    return torch.float16 if request.param else torch.bfloat16


@pytest.mark.parametrize("config", [SMALL, BIASED, WIDE], ids=["small", "with biases", "wide"])
@pytest.mark.parametrize("batch", [1, 6])
@pytest.mark.parametrize("precision", ["half", "int8"])
def test_lighter_steps_stay_near(config, batch, precision, weights_of_half):
    network, tokens = random_network(config), random_tokens(config, batch)
    expected = network(tokens)[:, 5:].detach()
    logits = stepped(network, tokens, 5, precision)
    allowed = 0.05 if precision == "int8" else 0.01 if weights_of_half == torch.float16 else 0.03
    assert logits.dtype == torch.float32
    assert 0 < (logits - expected).abs().max() < allowed * expected.abs().max()
    torch.testing.assert_close(logits[:, 0], expected[:, 0], rtol=0, atol=1e-5)  # the prompt is read in full


@pytest.mark.parametrize("precision", ["full", "half", "int8"])
def test_a_picture_does_not_depend_on_those_beside_it(precision):
    """Scales of activations shared by a batch would make it so."""
    network, tokens = random_network(), random_tokens(batch=4)
    tokens[1:] = tokens[1:].flip(1)
    together = stepped(network, tokens, 5, precision)
    torch.testing.assert_close(together[:1], stepped(network, tokens[:1], 5, precision), rtol=0, atol=1e-4)


@pytest.mark.parametrize("width", [3, 33, 48, 100])
@pytest.mark.parametrize("rows", [1, 5])
def test_int8_products_of_any_width(width, rows):
    """torch's kernel reads past the end of rows that are no multiple of 16 wide."""
    linear, x = torch.nn.Linear(width, 32), torch.randn(rows, width)
    expected = linear(x).detach()
    for _ in range(5):
        found = decoding.make_product(linear, rows, "int8")(x).detach()
        assert (found - expected).abs().max() < 0.05 * expected.abs().max()


def test_weights_that_float16_cannot_hold_stay_as_they_are():
    network, tokens = random_network(), random_tokens()
    with torch.no_grad():
        network.h[0].mlp.c_fc.weight[0, 0] = 1e6
        network.h[0].mlp.c_proj.weight[:, 0] *= 1e-6
    before = network.h[0].mlp.c_fc.weight.clone()
    expected = network(tokens)[:, 5:].detach()
    found = stepped(network, tokens, 5, "half")
    assert (found - expected).abs().max() < 0.01 * expected.abs().max()
    assert torch.equal(network.h[0].mlp.c_fc.weight, before)


@pytest.mark.parametrize("precision", [None, "half", "int8"])
def test_noise_is_not_passed_off_as_a_picture(precision):
    network, tokens = random_network(), random_tokens()
    with torch.no_grad():
        network.h[1].mlp.c_fc.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="not all finite"):
        complete(network, tokens[:, :8], precision=precision)
    bert = random_network(SMALL_BERT)
    with torch.no_grad():
        bert.ln_f.weight[0] = float("inf")
    with pytest.raises(ValueError, match="not all finite"):
        inpaint(bert, tokens, torch.arange(16).expand(2, 16) < 8, precision=precision)


@pytest.mark.parametrize("precision", ["half", "int8"])
def test_lighter_steps_keep_the_likelihood(precision):
    """Mean nats of images that the network drew itself; docs/how-to/sampling.md states the bound."""
    network = random_network(WIDE)
    with torch.no_grad():
        network.lm_head.weight.mul_(0.3)
    tokens = complete(network, torch.empty(1, 0, dtype=torch.long), n_samples=64, generator=torch.manual_seed(0))[0]
    nats = torch.nn.functional.cross_entropy(stepped(network, tokens, 0, precision).flatten(0, 1), tokens.flatten())
    exact = score(network, tokens).mean()
    assert 0.5 < exact < 3.4 and abs(nats - exact) < {"half": 0.0005, "int8": 0.005}[precision]


class HostReads(TorchDispatchMode):
    """Counts what would make the host wait for a device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        waits = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique")
        self.count += any(name in str(function) for name in waits)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [{}, {"temperature": 0}, {"top_k": 3, "top_p": 0.9}])
def test_no_step_asks_the_device_for_a_number(options):
    network, tokens, reads = random_network(WIDE), random_tokens(WIDE), []
    for given in (63, 32, 0):
        with HostReads() as mode:
            complete(network, tokens[:, :given], **options)
        reads.append(mode.count)
    assert reads[0] == reads[1] <= 4 and reads[2] <= reads[1]  # checks of the prompt, and where the holes are


def test_a_window_of_the_cache_changes_nothing():
    """What a captured step computes, run eagerly: the position is a tensor and the window larger than what was seen."""
    network, tokens = random_network(dtype=torch.float64), random_tokens()
    expected = network(tokens)
    cache = KVCache(SMALL, 2, dtype=torch.float64)
    cache.k.fill_(7), cache.v.fill_(1e6)  # what lies beyond the position must not count
    with torch.no_grad():
        network(tokens[:, :5], cache=cache)
        for t in range(5, 15):
            cache.window = 8 if t < 7 else 16
            logits = network(tokens[:, t : t + 1], cache=cache)[:, 0]
            torch.testing.assert_close(logits, expected[:, t + 1], rtol=0, atol=1e-12)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["full", "half"])
def test_captured_steps_equal_the_network_on_cuda(precision):
    network, tokens = random_network(WIDE).cuda(), random_tokens(WIDE, 3).cuda()
    expected = network(tokens)[:, 9:]
    decoder = Decoder(network, 3, precision)
    with torch.no_grad():
        logits = [decoder.start(tokens[:, :9])]
        logits += [decoder.step(tokens[:, t : t + 1]).float().clone() for t in range(9, 63)]
    assert decoder._step.works and len(decoder._step.graphs) == decoding.WINDOWS - 1
    assert int(decoder.cache.position) == decoder.cache.length == 64
    allowed = {"full": 1e-4, "half": 0.05}[precision] * float(expected.abs().max())
    torch.testing.assert_close(torch.stack(logits, 1), expected, rtol=0, atol=allowed)
