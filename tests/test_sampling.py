import itertools
import math

import pytest
import torch

from lightning_igpt.config import ImageGPTConfig
from lightning_igpt.decoding import Decoder
from lightning_igpt.sampling import complete, draw, inpaint, score
from lightning_igpt.weights import huggingface
from tests.networks import SMALL, SMALL_BERT, random_network, random_tokens
from tests.test_model import their_model


def naive_complete(network, prompt, generator, **options):
    """One full forward pass per pixel, as in OpenAI's own sampler."""
    tokens = torch.cat([prompt, prompt.new_zeros(len(prompt), network.config.n_positions - prompt.shape[1])], 1)
    for position in range(prompt.shape[1], network.config.n_positions):
        tokens[:, position] = draw(network(tokens)[:, position], generator=generator, **options)
    return tokens


@pytest.mark.parametrize("given", [0, 1, 8, 15])
@pytest.mark.parametrize("options", [{}, {"temperature": 0}, {"temperature": 0.7, "top_k": 5}, {"top_p": 0.8}])
def test_cached_completion_equals_the_naive_one(given, options):
    network, prompt = random_network(dtype=torch.float64), random_tokens()[:, :given]
    expected = naive_complete(network, prompt, torch.manual_seed(3), **options)
    found = complete(network, prompt, generator=torch.manual_seed(3), **options)
    assert found.shape == (2, 1, 16)
    assert torch.equal(found[:, 0], expected)


def test_greedy_completion_equals_transformers_generate():
    theirs = their_model(torch.float32)
    ours = huggingface.from_state_dict(theirs.state_dict(), theirs.config.to_dict(), "theirs").eval()
    prompt = random_tokens()[:, :6]
    with_sos = torch.cat([torch.full((2, 1), 20), prompt], 1)
    expected = theirs.generate(with_sos, max_length=17, do_sample=False, pad_token_id=0)[:, 1:]
    assert torch.equal(complete(ours, prompt, temperature=0)[:, 0], expected)


def test_samples_follow_the_models_distribution():
    """Two pixels of three colors: every picture's frequency against its exact probability."""
    config = ImageGPTConfig(n_layer=1, n_head=1, n_embd=8, vocab_size=3, image_size=2)
    network = random_network(config)
    pictures = torch.tensor(list(itertools.product(range(3), repeat=4)))
    probability = score(network, pictures).sum(1).neg().exp()
    assert probability.sum().item() == pytest.approx(1, abs=1e-5)  # score() is a normalized likelihood
    drawn = complete(network, torch.empty(1, 0, dtype=torch.long), n_samples=20_000, generator=torch.manual_seed(0))[0]
    index = (drawn * torch.tensor([27, 9, 3, 1])).sum(1)
    frequency = torch.bincount(index, minlength=81) / 20_000
    error = (probability * (1 - probability) / 20_000).sqrt()
    assert ((frequency - probability).abs() <= 5 * error + 1e-4).all()


def test_top_k_and_top_p_keep_what_they_say():
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).repeat(4000, 1)
    drawn = lambda **options: set(draw(logits, generator=torch.manual_seed(0), **options).tolist())  # noqa: E731
    assert drawn() == {0, 1, 2, 3}
    assert drawn(top_k=2) == {0, 1}
    assert drawn(top_p=0.5) == {0}
    assert drawn(top_p=0.51) == {0, 1}
    assert drawn(top_p=0.9) == {0, 1, 2}
    assert drawn(top_k=3, top_p=0.79) == {0, 1}
    frequency = (draw(logits, 0.5, generator=torch.manual_seed(0)) == 0).float().mean()
    assert frequency.item() == pytest.approx(0.25 / (0.25 + 0.09 + 0.0225 + 0.0025), abs=0.03)


@pytest.mark.parametrize("config", [SMALL, SMALL_BERT], ids=["autoregressive", "BERT"])
def test_inpaint_keeps_what_is_known_and_is_seeded(config):
    network, tokens = random_network(config), random_tokens()
    known = torch.rand(2, 16, generator=torch.manual_seed(0)) < 0.4
    filled = inpaint(network, tokens, known, generator=torch.manual_seed(1))
    assert torch.equal(filled[known], tokens[known])
    assert torch.equal(filled, inpaint(network, tokens, known, generator=torch.manual_seed(1)))
    elsewhere = torch.where(known, tokens, (tokens + 1) % 20)
    assert torch.equal(filled, inpaint(network, elsewhere, known, generator=torch.manual_seed(1)))


def test_inpaint_reveals_the_surest_first():
    network, tokens = random_network(SMALL_BERT), random_tokens(batch=1)
    known = torch.arange(16).expand(1, 16) < 8
    seen = []
    network.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs["masked"]), with_kwargs=True)
    inpaint(network, tokens, known, steps=4, temperature=0)
    left = [int(masked.sum()) for masked in seen]
    assert left == [math.floor(8 * math.cos(math.pi / 2 * step / 4)) for step in range(4)]
    assert all(not (later & ~earlier).any() for earlier, later in itertools.pairwise(seen))
    certainty = network(tokens.masked_fill(~known, 0), masked=~known).log_softmax(-1).amax(-1)[0]
    revealed = seen[0][0] & ~seen[1][0]
    assert certainty[revealed].min() >= certainty[seen[1][0]].max()


SCATTERED = torch.rand(6, 16, generator=torch.Generator().manual_seed(5)) < 0.6
SCATTERED[3] = True  # nothing to draw beside rows that lack something
SCATTERED[4, :9] = True  # a first hole later than the others'


@pytest.mark.parametrize("temperature", [0, 1])
def test_raster_inpainting_equals_the_naive_one_under_a_mask_per_row(temperature):
    network, tokens = random_network(dtype=torch.float64), random_tokens(batch=6)
    expected, holes = tokens.clone(), (~SCATTERED).any(0).nonzero().flatten()
    generator = torch.manual_seed(3)
    for position in range(int(holes[0]), int(holes[-1]) + 1):
        drawn = draw(network(expected)[:, position], temperature, generator=generator)
        expected[:, position] = torch.where(SCATTERED[:, position], tokens[:, position], drawn)
    found = inpaint(network, tokens, SCATTERED, temperature=temperature, generator=torch.manual_seed(3))
    assert torch.equal(found, expected)
    assert torch.equal(found[SCATTERED], tokens[SCATTERED])


def test_raster_inpainting_costs_one_pass_to_the_first_hole_and_one_step_per_pixel_to_the_last(monkeypatch):
    network, tokens = random_network(), random_tokens()
    known = torch.ones(2, 16, dtype=torch.bool)
    known[0, 7] = known[1, 5] = known[1, 9] = False
    read, step = [], Decoder.step
    network.register_forward_pre_hook(lambda module, args: read.append(args[0].shape[1]))
    monkeypatch.setattr(Decoder, "step", lambda self, pixel: read.append(pixel.shape[1]) or step(self, pixel))
    inpaint(network, tokens, known, generator=torch.manual_seed(0))
    assert read == [5, 1, 1, 1, 1]
    inpaint(network, tokens, torch.ones_like(known))
    assert len(read) == 5


def test_score_is_the_surprise_of_each_pixel_in_any_batching():
    network, tokens = random_network(), random_tokens(batch=5)
    expected = -network(tokens).log_softmax(-1).gather(2, tokens[..., None])[..., 0]
    torch.testing.assert_close(score(network, tokens), expected.detach())
    torch.testing.assert_close(score(network, tokens, batch_size=2), expected.detach())
    assert score(network, tokens).shape == (5, SMALL.n_positions)


@pytest.mark.parametrize("config", [SMALL, SMALL_BERT])
@pytest.mark.parametrize("holes", [range(5, 16), [2, 3, 9]])
def test_progress_is_reported_and_changes_no_draw(config, holes):
    network, tokens, calls = random_network(config).train(), random_tokens(config), []
    known = torch.ones(2, 16, dtype=torch.bool)
    known[:, list(holes)] = False
    before = tokens.clone(), known.clone()

    def watch(now, decided):
        calls.append((now.clone(), decided.clone()))

    quiet = inpaint(network, tokens, known, steps=4, generator=torch.manual_seed(2))
    filled = inpaint(network, tokens, known, steps=4, generator=torch.manual_seed(2), on_progress=watch)
    assert torch.equal(filled, quiet) and network.training
    assert torch.equal(tokens, before[0]) and torch.equal(known, before[1])
    decided = [known, *(decided for _, decided in calls)]
    assert all((after >= before).all() for before, after in itertools.pairwise(decided)) and decided[-1].all()
    assert all(torch.equal(now[decided], filled[decided]) for now, decided in calls)
    assert len(calls) == (4 if config is SMALL_BERT else max(holes) // 4 - min(holes) // 4 + 1)  # steps, or rows


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"n_samples": 0}, "n_samples is 0"),
        ({"prompt": random_tokens()}, "16 pixels and the image only 16"),
        ({"prompt": torch.tensor([[0, 20]])}, "run from 0 to 20; this network has 20 colors"),
        ({"prompt": torch.rand(1, 3)}, "int64"),
        ({"network": random_network(SMALL_BERT)}, r"inpaint\(\)"),
    ],
)
def test_wrong_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        complete(**{"network": random_network(), "prompt": random_tokens()[:, :4]} | options)
