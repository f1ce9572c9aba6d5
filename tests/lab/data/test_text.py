from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from refimpl.core.errors import CalibrationError, OptionError
from refimpl.lab.data import text

WORDS = [f"w{i}" for i in range(60)]


@pytest.fixture(scope="module")
def words():
    """A tokenizer of one token a word, without special tokens."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["?", "<s>", *WORDS])}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?", bos_token="<s>")


@pytest.fixture(scope="module")
def words_with_bos(words):
    backend = Tokenizer.from_str(words.backend_tokenizer.to_str())
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?", bos_token="<s>")


# --- splits ---


@pytest.mark.parametrize("corpus", text.CORPORA)
def test_splits_share_no_phrases(corpus):
    """No document of one split has more than the allowed share of its phrases in a document of another."""
    splits = [split for split in text.SPLITS if (corpus, split) != ("news", "calibration")]
    sets = {split: [text.phrases(document.text) for document in text.documents(corpus, split)] for split in splits}
    for one, other in itertools.combinations(splits, 2):
        owners: dict[tuple[str, ...], list[int]] = {}
        for i, found in enumerate(sets[other]):
            for phrase in found:
                owners.setdefault(phrase, []).append(i)
        for found in sets[one]:
            shared = [0] * len(sets[other])
            for phrase in found:
                for i in owners.get(phrase, ()):
                    shared[i] += 1
            for i, count in enumerate(shared):
                assert count <= text.SHARED_PHRASES * min(len(found), len(sets[other][i]))


def test_ids_are_unique():
    found = [
        document.id
        for corpus in text.CORPORA
        for split in text.SPLITS
        if (corpus, split) != ("news", "calibration")
        for document in text.documents(corpus, split)
    ]
    assert len(found) == len(set(found))


def test_documentation_lies_in_the_split_of_its_module():
    place = {d.title: split for split in text.SPLITS for d in text.documents("python", split)}
    both = [
        (place[d.title], split) for split in text.SPLITS for d in text.documents("prose", split) if d.title in place
    ]
    assert len(both) > 100
    assert all(source == prose for source, prose in both)


def test_near_duplicates_are_dropped_and_test_wins():
    base = " ".join(f"word{i}" for i in range(200))
    parsed = [(f"key {i}", text.Document(f"d{i}", "", f"{base} tail{i}")) for i in range(12)]
    parsed.append(("other", text.Document("other", "", " ".join(f"term{i}" for i in range(200)))))
    kept = text._split(parsed, "wikipedia")
    assert len(kept) == 2 and kept[1][1].id == "other"
    assert kept[0][0] == "test"


def test_split_depends_on_the_words_only():
    def place(spelling):
        return text._split([(spelling, text.Document("d", "", spelling))], "python")[0][0]

    for i in range(20):
        assert place(f"Some  Text, number {i}!") == place(f"some text number\n{i}")


def test_same_corpus_in_another_process():
    """Python's own hash of strings differs between processes; ours must not."""
    code = (
        "from refimpl.lab.data import text; t = text.evaluation('news', sequences=4, length=64);"
        "print(t.units, t.ids.sum().item(), text.corpus_hash('news'))"
    )
    output = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "1"},
    ).stdout
    here = text.evaluation("news", sequences=4, length=64)
    assert output == f"{here.units} {here.ids.sum().item()} {text.corpus_hash('news')}\n"


def test_news_is_for_evaluation_only():
    with pytest.raises(CalibrationError, match="evaluation only"):
        text.documents("news", "calibration")
    with pytest.raises(CalibrationError, match="evaluation only"):
        text.calibration("news")


def test_unknown_names_suggest():
    with pytest.raises(OptionError, match="did you mean 'wikipedia'"):
        text.documents("wikipeda", "test")
    with pytest.raises(OptionError, match="did you mean 'validation'"):
        text.documents("news", "validaton")
    with pytest.raises(OptionError, match="cannot be measured on"):
        text.evaluation("wikipedia", split="calibration")


def test_cached_corpus_loads_fast():
    text.prepare("python")
    text._read.cache_clear()
    start = time.process_time()
    text.documents("python", "test")
    assert time.process_time() - start < 1


# --- the texts themselves ---


def test_wikipedia_reads_as_prose():
    for split in text.SPLITS:
        for document in text.documents("wikipedia", split):
            for mark in ("{{", "}}", "[[", "]]", "'''", "==", "<ref", "||", "&nbsp;", "http://", "\xa0"):
                assert mark not in document.text, (document.id, mark)
            assert "See also" not in document.text.splitlines()


def test_clean_wiki():
    long = ", and a long rest of the sentence that says what the town is known for in the whole country."
    page = f"""{{{{Infobox|a=1}}}}
'''Ada''' is a [[Town (place)|town]] of {{{{convert|3|km2|sqmi}}}}{long}<ref>A book</ref>
[[File:ada.jpg|thumb|A [[bridge]] over the river]]
* a list item that is long enough to count as a sentence if it did not start with a star, as it does here.

==Name==
{{{{main|Names}}}}
The name is ''Ada'' ({{{{lang|grc|Αδα}}}}; {{{{IPA|ada}}}}){long}

==Empty==
===Also empty===

==References==
* A reference

A paragraph under the references{long}
"""
    assert text.clean_wiki(page) == f"Ada is a town of 3 km2{long}\n\nName\nThe name is Ada (Αδα){long}"


def test_python_is_source_written_by_people():
    titles = {d.title for split in text.SPLITS for d in text.documents("python", split)}
    assert {"argparse.py", "json/decoder.py"} <= titles
    parts = {part for title in titles for part in title.split("/")}
    assert not parts & {"test", "tests", "idlelib", "site-packages", "encodings"}
    for split in text.SPLITS:
        for document in text.documents("python", split):
            compile(document.text, document.title, "exec")


def test_prose_has_no_code():
    for split in text.SPLITS:
        for document in text.documents("prose", split):
            assert ">>>" not in document.text and "::=" not in document.text


# --- windows ---


def given(*sizes):
    return [
        text.Document(f"d{i}", "", " ".join(itertools.islice(itertools.cycle(WORDS), n))) for i, n in enumerate(sizes)
    ]


def test_windows_stay_inside_documents(words):
    """Words run in a cycle inside each document, so a window across a border would break it."""
    tokens = text._windows(given(45, 30, 73), words, 14, 10, "c", "test", key="k")
    steps = tokens.ids.diff(dim=1) % len(WORDS)
    assert tokens.ids.dtype == torch.int64 and tokens.ids.shape == (14, 10)
    assert (steps == 1).all()


def test_windows_do_not_overlap_and_spread(words):
    tokens = text._windows(given(58, 50, 41), words, 6, 10, "c", "test", key="k")
    assert sorted(tokens.units) == ["d0", "d0", "d1", "d1", "d2", "d2"]
    assert set(tokens.units[:3]) == {"d0", "d1", "d2"}
    for unit in set(tokens.units):
        ids = tokens.ids[[i for i, name in enumerate(tokens.units) if name == unit]].flatten()
        assert len(ids.unique()) == len(ids)


def test_short_documents_are_passed_over(words):
    tokens = text._windows(given(9, 25, 3), words, 2, 10, "c", "test", key="k")
    assert tokens.units == ["d1", "d1"]


def test_too_few_windows_says_how_many(words):
    with pytest.raises(CalibrationError, match=r"'c'.*sequences=9 .*length=10.* 5 available.*fewer sequences"):
        text._windows(given(25, 30), words, 9, 10, "c", "test", key="k")
    with pytest.raises(CalibrationError, match=r"'news'.*length=5000.* 0 available.*shorter length"):
        text.evaluation("news", words, sequences=4, length=5000)


@pytest.mark.parametrize("arguments", [{"sequences": 0}, {"length": 1}, {"length": 2.5}, {"sequences": True}])
def test_impossible_sizes(words, arguments):
    with pytest.raises(CalibrationError, match=next(iter(arguments))):
        text.calibration("wikipedia", words, **arguments)


def test_bos_starts_every_window_where_the_tokenizer_has_one(words, words_with_bos):
    tokens = text.from_texts([" ".join(WORDS[:20])], words_with_bos, length=5)
    assert tokens.ids.shape == (5, 5)
    assert (tokens.ids[:, 0] == 1).all() and (tokens.ids[:, 1:] > 1).all()
    assert (text.from_texts([" ".join(WORDS[:20])], words, length=5).ids > 1).all()


def test_special_tokens_in_a_text_are_plain_text(smollm2_folder):
    tokens = text.from_texts(["the mark <|im_start|> opens a turn and <|endoftext|> closes a text " * 4], length=32)
    assert (tokens.ids > 16).all()  # 0 to 16 are the special tokens


def test_seed_draws_other_windows_and_repeats(words):
    first, again, other = (text.calibration("wikipedia", words, 8, 32, seed=seed) for seed in (0, 0, 1))
    assert first.units == again.units and torch.equal(first.ids, again.ids)
    assert first.units != other.units


@pytest.mark.parametrize("corpus", text.CORPORA)
def test_default_sizes_are_there(smollm2_folder, corpus):
    length = 256 if corpus == "news" else 512
    for split in ("validation", "test"):
        tokens = text.evaluation(corpus, length=length, split=split)
        assert tokens.ids.shape == (32, length) and (tokens.corpus, tokens.split) == (corpus, split)
        ids = {document.id for document in text.documents(corpus, split)}
        assert set(tokens.units) <= ids
        assert len(set(tokens.units)) >= (32 if split == "test" else 16)
    if corpus != "news":
        assert text.calibration(corpus).ids.shape == (32, 512)


# --- own texts ---


def test_from_texts_file_and_folder(words, tmp_path):
    (tmp_path / "a.txt").write_text(" ".join(WORDS[:25]))
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.md").write_text(" ".join(WORDS[:10]))
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff\xfe")
    (tmp_path / ".hidden").write_text(" ".join(WORDS))
    assert text.from_texts(tmp_path, words, length=10).units == ["a.txt", "a.txt", "sub/b.md"]
    assert text.from_texts(str(tmp_path / "a.txt"), words, length=10).ids.tolist() == [
        list(range(2, 12)),
        list(range(12, 22)),
    ]


TEXT = "Café naïve résumé, 500 € over straße and 猫. " * 20


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_the_mark_of_an_encoding_is_heeded_and_left_out(tmp_path, encoding):
    (tmp_path / "plain.txt").write_text(TEXT, encoding="utf-8")
    (tmp_path / "marked.txt").write_text(TEXT, encoding=encoding)  # with a byte order mark
    plain, marked = (text.from_texts(tmp_path / f"{name}.txt", length=32).ids for name in ("plain", "marked"))
    assert torch.equal(plain, marked)


@pytest.mark.parametrize(
    "data, place",
    [
        (b"a line\n" + "Café".encode("latin-1"), "byte 10 is 0xe9"),
        ("plain words".encode("utf-16-le"), "byte 1 is 0"),  # UTF-16 without its mark
        (b"\xef\xbb\xbf" + "é".encode() + b"\0", "byte 5 is 0"),
        (b"\xff\xfea\0b", "byte 4 is 0x62"),  # cut off inside a character
    ],
)
def test_a_file_that_is_no_text_is_refused_with_the_byte(tmp_path, data, place, words, capsys):
    (tmp_path / "odd.txt").write_bytes(data)
    with pytest.raises(OptionError, match=rf"odd\.txt: {place}.*; convert it to UTF-8") as error:
        text.from_texts(tmp_path / "odd.txt", words, length=10)
    assert "\n" not in str(error.value)
    (tmp_path / "good.txt").write_text(" ".join(WORDS[:10]))
    (tmp_path / "more.txt").write_bytes(data)
    assert text.from_texts(tmp_path, words, length=10).units == ["good.txt"]
    assert f"2 files were skipped; the first: {tmp_path}/more.txt: {place}" in capsys.readouterr().err


def test_what_cannot_be_read_is_refused_by_name(tmp_path, words, monkeypatch):
    (tmp_path / "a.txt").write_text("words")

    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)  # a test that runs as root can read everything
    with pytest.raises(OptionError, match=r"a\.txt cannot be read \(Permission denied\)"):
        text.from_texts(tmp_path / "a.txt", words)


@pytest.mark.parametrize("texts", [[], ["", "  \n"]])
def test_empty_texts(words, texts):
    with pytest.raises(CalibrationError, match="holds no text"):
        text.from_texts(texts, words, length=10)


def test_too_short_texts(words):
    with pytest.raises(CalibrationError, match=r"length=10.* 0 available"):
        text.from_texts([" ".join(WORDS[:9])], words, length=10)


def test_missing_path(words):
    with pytest.raises(CalibrationError, match="list of strings"):
        text.from_texts("/no/such/file.txt", words)
