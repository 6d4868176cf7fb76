"""Perplexity, KL and agreement: the protocol of windows, and that no route sees what is scored."""

import math

import pytest
import torch
from eval_models import BOS

from dynadepth import disabled, recording, routing_of, vocabulary
from dynadepth.errors import ConfigError, DataError
from dynadepth.evaluation import divergence, evaluate, perplexity, scoring
from dynadepth.evaluation.perplexity import cut
from dynadepth.routing.context import is_disabled

TEXT = "".join(f"{i} green bottles, and {i * 7919 % 101} brown ones; " for i in range(40))
SMALL = {"window": 64, "prompt": 16}


def by_hand(model, windows, prompt, **inputs):
    """Log-probabilities of the scored tokens `[windows, scored, vocabulary]`, one plain forward a window."""
    out = []
    for window in windows:
        mask = (torch.arange(len(window)) < prompt)[None]
        extra = {"prompt_mask": mask} if inputs else {}
        with torch.no_grad():
            out.append(model(input_ids=window[None], **extra).logits[0, prompt - 1 : -1].float().log_softmax(-1))
    return torch.stack(out)


def test_windows_follow_one_another_and_the_rest_is_left(tokenizer):
    windows, prompt = cut(tokenizer, TEXT, 64, 16)
    assert prompt == 16
    assert windows.shape == (len(TEXT.encode()) // 64, 64)
    assert tokenizer.decode(windows.flatten()) == TEXT[: windows.numel()]


def test_the_first_windows_of_a_long_text_do_not_take_reading_all_of_it(tokenizer, monkeypatch):
    text = "A line of a long book, and then another one.\n" * 400
    whole, _ = cut(tokenizer, text, 64, 16)
    read = []

    def counting(piece, **options):
        read.append(len(piece))
        return tokenizer(piece, **options)

    first, _ = cut(counting, text, 64, 16, max_windows=3)
    assert torch.equal(first, whole[:3])
    assert max(read) < len(text) / 4
    monkeypatch.setitem(cut.__globals__, "CHARACTERS", 0.2)  # too few at first: more is read
    assert torch.equal(cut(tokenizer, text, 64, 16, max_windows=9)[0], whole[:9])


def test_special_tokens_start_every_window(bos_tokenizer):
    windows, _ = cut(bos_tokenizer, TEXT, 64, 16)
    assert (windows[:, 0] == BOS).all()
    assert bos_tokenizer.decode(windows[:, 1:].flatten()) == TEXT[: 63 * len(windows)]


def test_the_scored_tokens_are_those_after_the_prompt(llama, tokenizer):
    windows, _ = cut(tokenizer, TEXT, 64, 16)
    nll = -by_hand(llama, windows, 16).gather(2, windows[:, 16:, None]).mean().item()
    found = perplexity(llama, tokenizer, TEXT, **SMALL)
    assert found.n_tokens == len(windows) * 48
    assert found.nll == pytest.approx(nll, rel=1e-5)
    assert found.ppl == pytest.approx(math.exp(nll), rel=1e-4)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_batches_and_chunks_change_nothing(routed, tokenizer, monkeypatch, batch_size):
    expected = divergence(routed, tokenizer, TEXT, **SMALL, batch_size=4)
    monkeypatch.setattr(vocabulary, "CHUNK_ELEMENTS", 258 * 7)
    found = divergence(routed, tokenizer, TEXT, **SMALL, batch_size=batch_size)
    assert found.kl == pytest.approx(expected.kl, rel=1e-4)
    assert found.agreement == expected.agreement
    assert found.routed.nll == pytest.approx(expected.routed.nll, rel=1e-5)


def test_divergence_is_kl_of_dense_from_routed(routed, tokenizer):
    windows, _ = cut(tokenizer, TEXT, 64, 16)
    own = by_hand(routed, windows, 16, routed=True)
    with disabled(routed):
        dense = by_hand(routed, windows, 16)
    found = divergence(routed, tokenizer, TEXT, **SMALL)
    assert found.kl == pytest.approx((dense.exp() * (dense - own)).sum(-1).mean().item(), rel=1e-4)
    assert found.kl > 0.01
    assert found.agreement == pytest.approx((dense.argmax(-1) == own.argmax(-1)).float().mean().item())
    assert found.dense.nll == pytest.approx(-dense.gather(2, windows[:, 16:, None]).mean().item(), rel=1e-5)
    assert found.routed.nll == pytest.approx(-own.gather(2, windows[:, 16:, None]).mean().item(), rel=1e-5)


def test_both_perplexities_come_with_the_divergence(routed, tokenizer):
    both = divergence(routed, tokenizer, TEXT, **SMALL)
    assert both.routed.nll == pytest.approx(perplexity(routed, tokenizer, TEXT, **SMALL).nll, rel=1e-6)
    with disabled(routed):
        assert both.dense.nll == pytest.approx(perplexity(routed, tokenizer, TEXT, **SMALL).nll, rel=1e-6)


def test_a_model_without_routers_is_its_own_dense_model(llama, tokenizer):
    found = divergence(llama, tokenizer, TEXT, **SMALL)
    assert (found.kl, found.agreement) == (0.0, 1.0)
    assert found.routed == found.dense == perplexity(llama, tokenizer, TEXT, **SMALL)


def test_routes_do_not_see_the_scored_tokens(routed, tokenizer):
    prompts = [TEXT[i * 64 : i * 64 + 16] for i in range(8)]
    routes = []
    for filler in ("a", "zq"):
        with recording() as record:
            perplexity(routed, tokenizer, "".join(p + (filler * 48)[:48] for p in prompts), **SMALL)
        routes.append(record.sequences)
    assert routes[0] == routes[1]
    assert len({str(route) for route in routes[0]}) > 1, "the routers decide alike: this test sees nothing"


def test_the_dense_forwards_are_not_recorded(routed, tokenizer):
    with recording() as record:
        divergence(routed, tokenizer, TEXT, **SMALL)
    assert len(record.sequences) == len(cut(tokenizer, TEXT, 64, 16)[0])


def test_token_granularity_is_scored_too(make_routed, tokenizer):
    model = make_routed("token")
    found = divergence(model, tokenizer, TEXT, **SMALL)
    assert found.routed.nll == pytest.approx(perplexity(model, tokenizer, TEXT, **SMALL, batch_size=1).nll, rel=1e-5)
    assert found.kl > 0


def test_a_short_text_is_one_shorter_window(llama, tokenizer):
    with pytest.warns(UserWarning, match="windows of 40 tokens with a prompt of 10 .* the text has no more tokens"):
        found = perplexity(llama, tokenizer, TEXT[:40], **SMALL)
    assert found.n_tokens == 30


def test_windows_fit_the_models_positions(tokenizer, make_routed):
    model = make_routed(max_position_embeddings=48)
    with pytest.warns(UserWarning, match="windows of 48 tokens with a prompt of 12 .* no more positions"):
        found = perplexity(model, tokenizer, TEXT, **SMALL)
    assert found.n_tokens == 36 * (len(TEXT.encode()) // 48)


def test_a_window_asked_for_by_name_is_that_window_or_an_error(tokenizer, make_routed, tmp_path):
    model = make_routed(max_position_embeddings=48)
    for name in ("long", "short"):
        (tmp_path / f"{name}.txt").write_text(TEXT if name == "long" else TEXT[:40])
    long, short = (tmp_path / f"{name}.txt" for name in ("long", "short"))
    assert list(evaluate(model, tokenizer, perplexity=[f"{long}@48"])["perplexity"]) == [f"{long}@48"]
    with pytest.raises(DataError, match=r"long\.txt@64 asks for windows of 64 tokens, and the model reads 48: .*@48"):
        evaluate(model, tokenizer, perplexity=[f"{long}@64"])
    with pytest.raises(DataError, match=r"windows of 48 tokens were asked for.*no more tokens than 40: ask for @40"):
        evaluate(model, tokenizer, perplexity=[f"{short}@48"], compare_dense=True)


def test_the_mode_of_the_model_comes_back(routed, tokenizer):
    routed.train()
    lines = []
    perplexity(routed, tokenizer, TEXT, **SMALL, max_windows=3, batch_size=2, progress=lines.append)
    assert routed.training
    assert lines == ["2 of 3 windows", "3 of 3 windows"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"text": "abc"}, DataError, "3 tokens, too few"),
        ({"window": 16, "prompt": 16}, ConfigError, "a window of 16 tokens cannot have a prompt of 16"),
        ({"max_windows": 0}, ConfigError, "max_windows must be at least 1"),
    ],
)
def test_what_cannot_be_scored_is_refused(llama, tokenizer, options, error, message):
    with pytest.raises(error, match=message):
        perplexity(llama, tokenizer, **({"text": TEXT} | SMALL | options))


def test_dense_forwards_are_made_once_for_several_routed_models(make_routed, tokenizer, monkeypatch):
    model = make_routed("sequence")
    runs = []
    once = scoring.Scorer.__call__

    def counted(self, *args, **inputs):
        runs.append(is_disabled(routing_of(self.model)))
        return once(self, *args, **inputs)

    monkeypatch.setattr(scoring.Scorer, "__call__", counted)
    other = {"window": 64, "prompt": 24}
    expected = [divergence(model, tokenizer, TEXT, **protocol) for protocol in (SMALL, SMALL, other)]
    plain = sum(runs)
    runs.clear()
    kept = scoring.DenseStates()
    found = [divergence(model, tokenizer, TEXT, **protocol, dense_states=kept) for protocol in (SMALL, SMALL, other)]
    assert found == expected
    assert sum(runs) == plain * 2 // 3, "the second of the same windows and prompts has them, other prompts do not"
    runs.clear()
    full = scoring.DenseStates(most=8)
    assert [divergence(model, tokenizer, TEXT, **SMALL, dense_states=full) for _ in range(2)] == expected[:2]
    assert sum(runs) == plain * 2 // 3, "what does not fit runs anew"
