"""Calibration windows: the references' draws, replayed, and what is said about them."""

import gzip
import json
import random
from itertools import pairwise

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from camera.calibration.corpora import load_documents
from camera.calibration.settings import Calibration, check_calibration
from camera.calibration.tokens import calibration_tokens
from camera.calibration.windows import ids_hash
from camera.runtime.errors import CameraError

EOS = 256


@pytest.fixture(scope="module")
def tokenizer():
    """One token per byte, and EOS."""
    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab={**vocabulary, "<eos>": EOS}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


@pytest.fixture
def data(tmp_path):
    """A small offline layout: 40 lines of WikiText, 60 pages of C4 of 1 to 60 bytes."""
    rng = random.Random(7)
    (tmp_path / "wikitext2").mkdir()
    (tmp_path / "c4").mkdir()
    lines = ["".join(rng.choices("abcdef ", k=30)) + "\n" for _ in range(40)]
    (tmp_path / "wikitext2/train.txt").write_text("".join(lines))
    pages = [{"text": "".join(rng.choices("uvwxyz ", k=k + 1))} for k in range(60)]
    rows = "".join(json.dumps(page) + "\n" for page in pages)
    (tmp_path / "c4/train.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
    return tmp_path


def pages_of(data):
    with gzip.open(data / "c4/train.jsonl.gz", "rt") as lines:
        return [json.loads(line)["text"] for line in lines]


def test_wikitext_windows_are_the_references(tokenizer, data):
    got = calibration_tokens(tokenizer, Calibration(samples=9, length=16), data=data, seed=5)
    text = "\n\n".join((data / "wikitext2/train.txt").read_text().splitlines(keepends=True))
    stream = tokenizer(text)["input_ids"]
    random.seed(5)
    for window in got.ids_NL.tolist():
        start = random.randint(0, len(stream) - 16 - 1)
        assert window == stream[start : start + 16]
    assert got.ids_NL.shape == (9, 16) and got.ids_NL.dtype == torch.int64
    about = got.describe()
    assert about["documents"] == 40 and about["tokens_available"] == len(stream)
    assert about["hash"] == got.hash == ids_hash(got.ids_NL)
    assert (about["source"], about["samples"], about["length"], about["seed"]) == (
        "wikitext2",
        9,
        16,
        5,
    )
    json.dumps(about)


def test_c4_windows_are_the_references(tokenizer, data):
    got = calibration_tokens(tokenizer, Calibration("c4", 8, 40), data=data, seed=3)
    pages = pages_of(data)
    random.seed(3)
    for window in got.ids_NL.tolist():
        while True:
            ids = tokenizer(pages[random.randint(0, len(pages) - 1)])["input_ids"]
            if len(ids) > 40:
                break
        start = random.randint(0, len(ids) - 40 - 1)
        assert window == ids[start : start + 40]
    assert got.describe()["how"] == "random long documents"


def test_c4_joins_documents_where_few_are_long_and_says_so(tokenizer, data):
    got = calibration_tokens(tokenizer, Calibration("c4", 8, 58), data=data, seed=3)
    about = got.describe()
    assert about["how"].startswith("random windows of documents joined with EOS, as fewer than 8")
    assert EOS in got.ids_NL
    whole = [tokenizer(page)["input_ids"] for page in pages_of(data)]
    for window in got.ids_NL.tolist():
        ends = [i for i, token in enumerate(window) if token == EOS]
        for begin, end in pairwise(ends):
            assert window[begin + 1 : end] in whole


def test_joining_without_eos_is_said(tokenizer, data):
    plain = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    got = calibration_tokens(plain, Calibration("c4", 8, 58), data=data, seed=3)
    assert "without a separator (no EOS)" in got.describe()["how"]


def test_mixed_deals_both_corpora_in_turn(tokenizer, data):
    mixed = calibration_tokens(tokenizer, Calibration("mixed", 7, 20), data=data, seed=1)
    wiki = calibration_tokens(tokenizer, Calibration("wikitext2", 4, 20), data=data, seed=1)
    c4 = calibration_tokens(tokenizer, Calibration("c4", 3, 20), data=data, seed=1)
    assert torch.equal(mixed.ids_NL[0::2], wiki.ids_NL)
    assert torch.equal(mixed.ids_NL[1::2], c4.ids_NL)
    about = mixed.describe()
    assert about["how"].startswith("wikitext2: random windows") and "; c4: random" in about["how"]
    assert about["documents"] == wiki.description["documents"] + c4.description["documents"]


def test_a_mixture_of_halves_is_mixed(tokenizer, data):
    """The same tokens as before there were shares, under either name."""
    asked = Calibration("mix", 7, 20, sources={"wikitext2": 0.5, "c4": 0.5})
    mixed = calibration_tokens(tokenizer, Calibration("mixed", 7, 20), data=data, seed=1)
    mix = calibration_tokens(tokenizer, asked, data=data, seed=1)
    assert torch.equal(mixed.ids_NL, mix.ids_NL) and mixed.hash == mix.hash
    assert mix.sources == mixed.sources == ("wikitext2", "c4")
    assert mix.describe()["source"] == "wikitext2 50% + c4 50%"


def test_a_mixture_deals_each_source_by_its_share(tokenizer, data, tmp_path):
    own = tmp_path / "own.txt"
    own.write_text("zyxw" * 40)
    shares = {"c4": 0.3, str(own): 0.6, "wikitext2": 0.1}
    asked = Calibration("mix", 20, 12, sources=shares)
    got = calibration_tokens(tokenizer, asked, data=data, seed=2)
    assert [got.dealt.count(i) for i in range(3)] == [6, 12, 2]
    for n in range(1, 21):  # never more than a window from the shares, at any length
        for i, share in enumerate(shares.values()):
            assert abs(got.dealt[:n].count(i) - n * share) < 1
    for i, (source, share) in enumerate(shares.items()):
        alone = Calibration(source, round(20 * share), 12)
        want = calibration_tokens(tokenizer, alone, data=data, seed=2).ids_NL
        assert torch.equal(got.ids_NL[torch.tensor(got.dealt) == i], want)


def test_a_share_of_0_leaves_a_source_out(tokenizer, data):
    asked = Calibration("mix", 4, 12, sources={"c4": 1, "wikitext2": 0})
    alone = calibration_tokens(tokenizer, Calibration("c4", 4, 12), data=data, seed=2)
    got = calibration_tokens(tokenizer, asked, data=data, seed=2)
    assert got.hash == alone.hash and got.sources == ()


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (Calibration("mix"), "calibration.sources=None: give shares by name"),
        (Calibration("mix", sources={}), "calibration.sources={}: give shares by name"),
        (Calibration("c4", sources={"c4": 1.0}), "is of calibration=mix alone"),
        (Calibration("mix", sources={"c4": "much"}), "calibration.sources.c4=much: give a share"),
        (Calibration("mix", sources={"c4": -0.5}), "calibration.sources.c4=-0.5: give a share"),
        (
            Calibration("mix", sources={"c4": 0.5, "wikitext2": 0.3}),
            "add up to 0.8 instead of 1; give each source its share",
        ),
        (Calibration("mix", sources={"pile": 1.0}), "calibration.sources=pile: neither a known"),
        (
            Calibration("mix", 5, 8, sources={"c4": 0.9, "wikitext2": 0.1}),
            "calibration.samples=5: calibration.source=mix draws from 2 corpora; give at least 6",
        ),
    ],
)
def test_a_mixture_that_is_none_is_refused(asked, says, data):
    with pytest.raises(CameraError) as refused:
        check_calibration(asked, data=data)
    assert says in str(refused.value)


def test_a_local_file_is_a_source(tokenizer, tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("abcdefghij" * 10)
    got = calibration_tokens(tokenizer, Calibration(str(path), 4, 10), data="hub", seed=0)
    texts = [tokenizer.decode(ids).replace(" ", "") for ids in got.ids_NL]
    assert all(text in "abcdefghij" * 10 for text in texts)


def test_the_same_seed_gives_the_same_tokens(tokenizer, data):
    for source in ("wikitext2", "c4", "mixed"):
        for length in (12, 58):
            asked = Calibration(source, 6, length)
            hashes = [
                calibration_tokens(tokenizer, asked, data=data, seed=seed).hash
                for seed in (0, 0, 1)
            ]
            assert hashes[0] == hashes[1] != hashes[2]


def test_the_models_context_caps_the_length(tokenizer, data):
    asked = Calibration(samples=3, length=2048)
    got = calibration_tokens(tokenizer, asked, data=data, seed=0, max_length=32)
    assert got.ids_NL.shape == (3, 32)
    assert got.describe()["length"] == 32 and got.describe()["length_asked"] == 2048


def test_a_truncating_tokenizer_is_not_truncated(tokenizer, data):
    short = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    short.backend_tokenizer.enable_truncation(10)
    got = calibration_tokens(short, Calibration(samples=3, length=64), data=data, seed=0)
    assert got.ids_NL.shape == (3, 64)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (Calibration(samples=0), "calibration.samples=0"),
        (Calibration(samples=True), "calibration.samples=True"),
        (Calibration(length=1), "calibration.length=1"),
        (Calibration(length=2.5), "calibration.length=2.5"),
        (
            Calibration("mixed", 1, 8),
            "calibration.samples=1: calibration.source=mixed draws from 2",
        ),
        (Calibration("pile"), "calibration.source=pile: neither one of wikitext2, c4, mixed, ebss"),
        (Calibration(split="dev"), "calibration.source=wikitext2: no split 'dev'"),
        (Calibration("c4", split="validation"), "c4/validation.jsonl.gz is missing"),
    ],
)
def test_what_cannot_be_is_refused_before_reading(tokenizer, data, asked, says):
    with pytest.raises(CameraError, match=says):
        check_calibration(asked, data=data)
    with pytest.raises(CameraError, match=says):
        calibration_tokens(tokenizer, asked, data=data, seed=0)


def test_too_little_text_names_what_there_is(tokenizer, data):
    for source in ("wikitext2", "c4"):
        with pytest.raises(CameraError, match=r"calibration.length=5000: .* has only \d+ tokens"):
            calibration_tokens(tokenizer, Calibration(source, 4, 5000), data=data, seed=0)
    with pytest.raises(CameraError, match="max_length=1"):
        calibration_tokens(tokenizer, Calibration(), data=data, seed=0, max_length=1)
    (data / "wikitext2/train.txt").write_text("\n \n")
    with pytest.raises(CameraError, match="holds no text"):
        calibration_tokens(tokenizer, Calibration(), data=data, seed=0)


def test_what_an_editor_on_windows_adds_is_no_text(tokenizer, data):
    file, asked = data / "wikitext2/train.txt", Calibration(samples=9, length=16)

    def found():
        return calibration_tokens(tokenizer, asked, data=data, seed=5)

    text, plain = file.read_bytes(), found()
    file.write_bytes(b"\xef\xbb\xbf" + text.replace(b"\n", b"\r\n"))
    assert found().hash == plain.hash and found().describe() == plain.describe()


def test_half_a_character_in_a_document_is_replaced(tokenizer, data, tmp_path):
    pages = ["\ud83d" + "a" * 30, "\ud83d\ude00" + "b" * 30]
    rows = "".join(json.dumps({"text": page}) + "\n" for page in pages)
    (tmp_path / "cut.jsonl").write_text(rows)
    assert load_documents("hub", str(tmp_path / "cut.jsonl"), "file") == [
        "\ufffd" + "a" * 30,
        "\U0001f600" + "b" * 30,
    ]
    asked = Calibration(str(tmp_path / "cut.jsonl"), samples=2, length=16)
    assert calibration_tokens(tokenizer, asked, data=data, seed=5).ids_NL.shape == (2, 16)


def test_a_tokenizer_of_another_model_is_refused(tokenizer, data):
    asked = Calibration(samples=9, length=16)
    with pytest.raises(CameraError, match="embeds only 50; use the model with its own tokenizer"):
        calibration_tokens(tokenizer, asked, data=data, seed=5, vocabulary=50)
    assert calibration_tokens(tokenizer, asked, data=data, seed=5, vocabulary=257)


def test_a_text_that_is_mostly_unknown_is_said(data, caplog):
    letters = {"<unk>": 0, "a": 1, " ": 2}
    backend = Tokenizer(models.BPE(vocab=letters, merges=[], unk_token="<unk>"))
    poor = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    calibration_tokens(poor, Calibration(samples=9, length=16), data=data, seed=5)
    assert "calibration tokens of wikitext2 are unknown to the tokenizer" in caplog.text
