"""Sentences, entropy groups and vocabulary tables against slow transcriptions and real tokenizers."""

# ruff: noqa: RUF001 - CJK punctuation is what is tested

import json
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from megatron_rl.algorithms.objectives import SSPO
from megatron_rl.algorithms.segments import (
    TokenRun,
    entropy_groups,
    joint_ids,
    segment_means,
    segments_per_response,
    sentence_ids,
)
from megatron_rl.data.types import Batch
from megatron_rl.data.vocabulary import Granularity, Vocabulary
from tests.oracle.segments import sentences

END = b"<end>"
PIECES = [
    b"Hello",
    b" world",
    b".",
    b"3",
    b"14",
    b"3.",
    b",",
    b" ,",
    b", ",
    b"!",
    b"?)",
    b'."',
    b"\n\n",
    b"a\nb",
    b":",
    b" (",
    "。".encode(),
    "，".encode(),
    "；".encode()[:1],
    "；".encode()[1:],
    "。".encode()[:2],
    "。".encode()[2:],
    b'\x82"',
    "é".encode(),
    b")",
    b"...",
    b"1,000",
    b"x.",
    b"",
    END,
]
END_ID = PIECES.index(END)
VOCABULARY = Vocabulary(40, [b"" if piece == END else piece for piece in PIECES], frozenset([END_ID]))


def segment(runs: list[list[int]], granularity: Granularity = "subsentence", min_tokens: int = 1) -> list[int]:
    """Segment ids of stretches of token ids with gaps between them."""
    ids: list[int] = []
    positions: list[int] = []
    start = 0
    for run in runs:
        ids += run
        positions += range(start, start + len(run))
        start += len(run) + 1
    run = TokenRun(
        torch.tensor(ids, dtype=torch.int64), torch.tensor(positions), torch.zeros(len(ids), dtype=torch.int64)
    )
    return sentence_ids(run, VOCABULARY, granularity, min_tokens).tolist()


def written(*texts: bytes) -> list[int]:
    return [PIECES.index(text) for text in texts]


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        ([b"Hello", b",", b" world", b".", b"Hello"], [0, 0, 1, 1, 2]),
        ([b"3", b".", b"14", b"."], [0, 0, 0, 0]),
        ([b"3.", b"14", b"Hello"], [0, 0, 0]),
        ([b"3.", b"Hello"], [0, 1]),
        ([b"3", b",", b"Hello"], [0, 0, 1]),
        ([b"1,000", b",", b"14"], [0, 0, 0]),
        ([b"x.", b"14"], [0, 1]),
        ([b"Hello", b'."', b" world"], [0, 0, 1]),
        ([b"Hello", b"?)", b" world"], [0, 0, 1]),
        ([b"Hello", b"\n\n", b" world"], [0, 0, 1]),
        ([b"Hello", "。".encode(), b" world"], [0, 0, 1]),
        ([b"Hello", "。".encode()[:2], "。".encode()[2:], b" world"], [0, 0, 0, 1]),
        ([b"Hello", "；".encode()[:1], "；".encode()[1:], b" world"], [0, 0, 0, 1]),
        ([b"Hello", b".", END], [0, 0, 0]),
        ([b"Hello", b"!", END], [0, 0, 0]),
    ],
)
def test_where_a_subsentence_ends(texts, expected):
    assert segment([written(*texts)]) == expected


def test_sentences_ignore_commas():
    assert segment([written(b"Hello", b",", b" world", b".", b"x.")], "sentence") == [0, 0, 0, 0, 1]


def test_a_gap_closes_a_segment():
    assert segment([written(b"Hello"), written(b" world", b".")]) == [0, 1, 1]


def test_short_segments_are_merged_forward():
    tokens = written(b"!", b"Hello", b"!", b" world", b"!")
    assert segment([tokens]) == [0, 1, 1, 2, 2]
    assert segment([tokens], min_tokens=2) == [0, 0, 0, 1, 1]
    assert segment([tokens], min_tokens=4) == [0, 0, 0, 0, 0]


TOKENS = st.lists(st.lists(st.integers(0, len(PIECES) - 1), min_size=1, max_size=12), max_size=3)


@given(runs=TOKENS, granularity=st.sampled_from(["sentence", "subsentence"]), min_tokens=st.integers(1, 4))
@settings(max_examples=400, deadline=None, derandomize=True)
def test_sentences_equal_the_transcription(runs, granularity, min_tokens):
    pieces = [[PIECES[i] for i in run] for run in runs]
    assert segment(runs, granularity, min_tokens) == sentences(pieces, granularity, min_tokens)


def test_sspo_never_joins_responses_and_reads_trained_tokens_only():
    ids = torch.tensor(written(b".", b"Hello", b" world", b"Hello", b" world", b"."))
    batch = Batch(
        torch.tensor([3, 3]),
        {
            "input_ids_T": ids,
            "loss_mask_T": torch.tensor([False, True, True, True, False, True]),
            "advantages_B": torch.ones(2),
            "old_entropies_T": torch.ones(6),
        },
    )
    columns = SSPO().prepare(batch, VOCABULARY)
    assert columns["segment_ids_T"].tolist() == [-1, 0, 0, 1, -1, 2]
    # A prompt token's entropy is not read.
    columns = SSPO().prepare(batch.add({"old_entropies_T": torch.tensor([math.nan, 1, 2, 1, math.nan, 3])}), VOCABULARY)
    torch.testing.assert_close(columns["clip_low_T"][1], torch.tensor(0.03 * 1.5 / 1.75))


@given(
    entropies=st.lists(st.lists(st.sampled_from([0.0, 0.1, 0.5, 0.5, 2.0]), max_size=12), max_size=4),
    percent=st.integers(1, 100),
)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_upper_group_is_the_share_of_highest_entropy(entropies, percent):
    flat = torch.tensor([h for row in entropies for h in row])
    rows = torch.tensor([i for i, row in enumerate(entropies) for _ in row], dtype=torch.int64)
    expected: list[int] = []
    for row in entropies:
        top = sorted(range(len(row)), key=lambda t: (-row[t], t))[: -(-percent * len(row) // 100)]
        expected += [int(t in top) for t in range(len(row))]
    assert entropy_groups(flat, rows, upper_shares=[Fraction(percent, 100)]).tolist() == expected


def test_thresholds_and_several_shares():
    entropies, rows = torch.tensor([0.0, 1.0, 0.5, 2.0]), torch.zeros(4, dtype=torch.int64)
    assert entropy_groups(entropies, rows, thresholds=[0.5, 2.0]).tolist() == [0, 1, 1, 2]
    shares = [Fraction(1, 2), Fraction(1, 4)]
    assert entropy_groups(entropies, rows, upper_shares=shares).tolist() == [0, 1, 0, 2]


def test_segment_sums_and_ids():
    ids, responses = torch.tensor([7, 7, -2, 7]), torch.tensor([0, 0, 0, 1])
    means, sizes = segment_means(torch.tensor([1.0, 2.0, 5.0, 3.0]), joint_ids(responses, ids))
    assert means.tolist() == [1.5, 1.5, 5.0, 3.0]
    assert sizes.tolist() == [2, 2, 1, 1]
    assert segments_per_response(ids, responses).tolist() == [2, 2, 2, 1]


TEXT = "One, two. Three! 3.14 and 1,000: naïve Grüße\n你好，世界。今天；很好！ 🙂🚀 done."


def byte_level() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT[:60]] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def byte_fallback() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[.,:;!?\n]|\u2581"), "isolated")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    specials = ["<unk>", "<eos>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=specials, show_progress=False)
    tokenizer.train_from_iterator([TEXT[:40]] * 3, trainer)
    # The byte tokens are part of the vocabulary, not added tokens.
    table = json.loads(tokenizer.to_str())
    table["added_tokens"] = [token for token in table["added_tokens"] if not token["content"].startswith("<0x")]
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(table)), eos_token="<eos>")


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_pieces_of_a_real_tokenizer_spell_its_text(make):
    tokenizer = make()
    vocabulary = Vocabulary.from_tokenizer(tokenizer, len(tokenizer) + 11)
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    assert b"".join(vocabulary.pieces[i] for i in ids).decode() == TEXT
    assert vocabulary.end_ids == {tokenizer.eos_token_id}
    assert vocabulary.pieces[tokenizer.eos_token_id] == b""
    assert len(vocabulary.boundaries("sentence").closes_V) == vocabulary.size


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_sentences_of_a_real_tokenizer(make):
    tokenizer = make()
    vocabulary = Vocabulary.from_tokenizer(tokenizer, len(tokenizer))
    ids = [*tokenizer.encode(TEXT, add_special_tokens=False), tokenizer.eos_token_id]
    run = TokenRun(torch.tensor(ids), torch.arange(len(ids)), torch.zeros(len(ids), dtype=torch.int64))
    segments = sentence_ids(run, vocabulary, "subsentence").tolist()
    texts = [b""] * (segments[-1] + 1)
    for token_id, segment_id in zip(ids, segments, strict=True):
        texts[segment_id] += vocabulary.pieces[token_id]
    assert [text.decode().strip() for text in texts] == [
        "One,",
        "two.",
        "Three!",
        "3.14 and 1,000:",
        "naïve Grüße",
        "你好，",
        "世界。",
        "今天；",
        "很好！",
        "🙂🚀 done.",
    ]
