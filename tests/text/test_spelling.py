"""What tokens say is what their library's decoder says, for every construction of a tokenizer, token by token."""

import json

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from opendeep_jax.config.checks import ConfigError
from opendeep_jax.text.files import load_tokenizer, tokenizer_from_hf
from opendeep_jax.text.spelling import IncrementalDecoder, read_byte_decoder
from opendeep_jax.text.stream import TextStream
from opendeep_jax.text.tokenizer import Tokenizer

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
LETTERS = "abcdefghijklmnopqrstuvwxyzH.,'!é数:()=1\n"
SENTENCEPIECE = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]


def with_marks(library, *more) -> tokenizers.Tokenizer:
    """The library with added tokens of every kind."""
    library.add_special_tokens(["<s>", "</s>"])
    kinds = [
        AddedToken("<think>", normalized=False),
        AddedToken("<tool>", normalized=True),
        AddedToken("<left>", lstrip=True, normalized=False),
        AddedToken("<right>", rstrip=True, normalized=False),
        AddedToken("<word>", single_word=True, normalized=False),
    ]
    library.add_tokens([*kinds, *more])
    return library


def byte_level() -> tokenizers.Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = {name: i for i, name in enumerate([*alphabet, "th", "the", "Ġt", "Ġthe"])}
    library = tokenizers.Tokenizer(models.BPE(names, [("t", "h"), ("th", "e"), ("Ġ", "t"), ("Ġt", "he")][:3]))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    return with_marks(library, AddedToken("Ġé", normalized=False))


def gemma() -> tokenizers.Tokenizer:
    """BPE with bytes to fall back on, and added tokens that stand for runs of spaces."""
    names = {n: i for i, n in enumerate(["<unk>", *BYTES, "▁", *LETTERS, "▁▁", "▁▁▁▁", "th", "the"])}
    merges = [("▁", "▁"), ("▁▁", "▁▁"), ("t", "h"), ("th", "e")]
    library = tokenizers.Tokenizer(models.BPE(names, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    library.normalizer = normalizers.Replace(" ", "▁")
    library.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    library.decoder = decoders.Sequence(SENTENCEPIECE)
    library.add_tokens([AddedToken(run, normalized=False) for run in ("▁▁", "▁▁▁▁")])
    return with_marks(library)


def llama(metaspace: bool = False) -> tokenizers.Tokenizer:
    library = gemma()
    if metaspace:
        library.normalizer = None
        library.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        library.pre_tokenizer = None
    library.decoder = decoders.Sequence([*SENTENCEPIECE, decoders.Strip(" ", 1, 0)])
    return library


def unigram() -> tokenizers.Tokenizer:
    pieces = [("<unk>", 0.0), ("▁", -2.0), ("▁the", -1.0), ("th", -1.5), ("he", -1.5), *((c, -4.0) for c in LETTERS)]
    library = tokenizers.Tokenizer(models.Unigram(pieces, 0))
    library.pre_tokenizer, library.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return with_marks(library)


def word_piece() -> tokenizers.Tokenizer:
    names = {n: i for i, n in enumerate(["[UNK]", *LETTERS, *(f"##{c}" for c in LETTERS), "the", "##he", "don"])}
    library = tokenizers.Tokenizer(models.WordPiece(names, unk_token="[UNK]"))
    library.pre_tokenizer, library.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    return with_marks(library)


def end_of_word() -> tokenizers.Tokenizer:
    names = {n: i for i, n in enumerate([*LETTERS, *(f"{c}</w>" for c in LETTERS), "th", "the</w>"])}
    library = tokenizers.Tokenizer(models.BPE(names, [("t", "h"), ("th", "e</w>")], end_of_word_suffix="</w>"))
    library.pre_tokenizer, library.decoder = pre_tokenizers.BertPreTokenizer(), decoders.BPEDecoder()
    return with_marks(library)


def undecoded() -> tokenizers.Tokenizer:
    library = unigram()
    library.decoder = None
    return library


MADE = {
    "byte-level": byte_level(),
    "gemma": gemma(),
    "llama": llama(),
    "llama, metaspace": llama(metaspace=True),
    "unigram": unigram(),
    "word piece": word_piece(),
    "end of word": end_of_word(),
    "no decoder": undecoded(),
}
WHOLE = ["byte-level", "gemma", "llama", "llama, metaspace"]
SPELLINGS = {name: read_byte_decoder(library) for name, library in MADE.items()}
TEXTS = st.lists(
    st.sampled_from(["the", " the", "  ", "    ", "   ", " ", "\n", "don't", "é", "数据", "🙂", "x = f(1)", "."])
    | st.sampled_from(["▁", "Ġé", "<0x41>"])
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=3),
    max_size=8,
).map("".join)
MARKS = ["<s>", "</s>", "<think>", "<tool>", " <left> ", " <right> ", "<word>", "▁▁"]


def specials(library) -> set[int]:
    return {i for i, token in library.get_added_tokens_decoder().items() if token.special}


@pytest.mark.parametrize("name", MADE)
@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=60, deadline=None)
def test_any_ids_say_what_the_library_decodes_in_any_pieces(name, data):
    library, spelling = MADE[name], SPELLINGS[name]
    raw = sorted(spelling.raw) or [0]
    ids = data.draw(st.lists(st.integers(0, len(spelling.pieces) - 1) | st.sampled_from(raw), max_size=10))
    for hidden in ((), specials(library)):
        wanted = library.decode(ids, skip_special_tokens=bool(hidden))
        assert spelling.text(ids, hidden) == wanted
        speech, shown = IncrementalDecoder(spelling, hidden), ""
        for i in ids:
            shown += speech.push([i])
            assert wanted.startswith(shown)  # nothing is ever taken back
        assert shown + speech.finish() == wanted
        if "\ufffd" not in wanted and not spelling.last:
            assert sum(spelling.lengths(ids, hidden)) == len(wanted.encode())


@pytest.mark.parametrize("name", MADE)
@hypothesis.given(text=st.lists(TEXTS | st.sampled_from(MARKS), max_size=4).map("".join))
@hypothesis.settings(max_examples=40, deadline=None)
def test_tokenizer_and_stream_read_and_write_texts_as_the_library_does(name, text):
    tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(MADE[name].to_str()))
    ids = tokenizer.encode(text, special=True)
    assert ids == MADE[name].encode(text, add_special_tokens=False).ids
    for special in (True, False):
        stream = TextStream(tokenizer, special=special)
        streamed = "".join(stream.push([i]) for i in ids) + stream.finish()
        assert tokenizer.decode(ids, special) == MADE[name].decode(ids, skip_special_tokens=not special) == streamed


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    found = {}
    for name in ("byte-level", "gemma", "llama", "llama, metaspace", "unigram", "word piece"):
        path = tmp_path_factory.mktemp("made") / "tokenizer.json"
        MADE[name].save(str(path))
        found[name] = load_tokenizer(path)
    return found


@pytest.mark.parametrize("name", WHOLE)
@hypothesis.given(text=TEXTS)
@hypothesis.settings(max_examples=40, deadline=None)
def test_bytes_of_a_documents_tokens_add_up_to_what_is_decoded(loaded, name, text):
    tokenizer = loaded[name]
    (ids,) = tokenizer.encode_batch([text])
    sizes = [*tokenizer.first_bytes[ids[:1]], *tokenizer.token_bytes[ids[1:]]]
    said = tokenizer.decode(ids)
    if "\ufffd" not in said:
        assert sum(sizes) == len(said.encode())
        assert (tokenizer.lost_bytes(text.encode(), ids) == 0) == (said == text)


@pytest.mark.parametrize(
    "name, text, lost",
    [
        ("unigram", "the 数据🙂 he", 7),
        ("word piece", "the ab🙂c the", 8),
        ("byte-level", "数据🙂", 0),
        ("gemma", "🙂  数", 0),
    ],
)
def test_what_a_tokenizer_has_no_token_for_is_counted_in_bytes(loaded, name, text, lost):
    tokenizer = loaded[name]
    assert tokenizer.lost_bytes(text.encode(), tokenizer.encode_batch([text])[0]) == lost


def test_a_prompt_with_letters_that_no_token_says_is_warned_of(caplog):
    Tokenizer(unigram()).encode_prompt("the ж")
    assert "no token for 'ж'" in caplog.text
    caplog.clear()
    for name in WHOLE:
        Tokenizer(MADE[name]).encode_prompt("the 数据 🙂")
    assert not caplog.text


@pytest.mark.parametrize(
    "decoder",
    [decoders.CTC(), decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "c")])],
)
def test_a_decoder_that_gives_no_text_to_single_tokens_is_refused(decoder):
    library = unigram()
    library.decoder = decoder
    with pytest.raises(ConfigError, match="decoder"):
        read_byte_decoder(library)


def test_dropout_is_switched_off_with_a_word(tmp_path, caplog):
    library = byte_level()
    library.model.dropout = 0.5
    library.save(str(tmp_path / "tokenizer.json"))
    plain, tokenizer = load_tokenizer(tmp_path / "tokenizer.json"), tokenizer_from_hf(tmp_path)
    assert caplog.text.count("dropout 0.5") == 2
    wanted = byte_level().encode("the the the").ids
    for _ in range(20):
        assert tokenizer.encode("the the the") == plain.encode("the the the") == wanted


LEADING = [("<s>", 0), "$A:0"]


@pytest.mark.parametrize(
    "processor, settings, begin",
    [
        (None, {}, []),
        (None, {"bos_token": "<s>"}, []),
        (None, {"bos_token": "<s>", "add_bos_token": True}, ["<s>"]),
        (None, {"bos_token": None, "add_bos_token": True, "eos_token": "</s>"}, []),
        (processors.ByteLevel(), {"bos_token": "<s>", "add_bos_token": False}, []),
        ("<s> $A", {"bos_token": "<s>"}, ["<s>"]),
        ("<s> $A </s>", {}, ["<s>"]),
        ("</s> <s> $A", {"bos_token": "<s>"}, ["</s>", "<s>"]),
        ("$A </s>", {"bos_token": "<s>"}, []),
    ],
)
def test_a_text_begins_as_the_tokenizers_files_say_and_so_do_its_copies(processor, settings, begin, tmp_path):
    from opendeep_jax.text.files import save_tokenizer
    from opendeep_jax.text.gguf_tokenizer import gguf_fields_of, tokenizer_from_gguf_fields

    library = byte_level()
    ids = {name: library.token_to_id(name) for name in ("<s>", "</s>")}
    if isinstance(processor, str):
        pair = processor.replace("$A", "$A $B")
        processor = processors.TemplateProcessing(single=processor, pair=pair, special_tokens=list(ids.items()))
    if processor is not None:
        library.post_processor = processor
    library.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = tokenizer_from_hf(tmp_path)
    wanted = [ids[name] for name in begin]
    assert tokenizer.encode_prompt("the") == [*wanted, *tokenizer.encode("the")]
    run = tokenizer_from_hf(save_tokenizer(tokenizer, tmp_path / "run").parent)
    back = tokenizer_from_gguf_fields(gguf_fields_of(run, run.vocab_size, "gpt-2"))
    again = tokenizer_from_hf(save_tokenizer(back, tmp_path / "again").parent)
    for copy in (run, back, again):
        assert copy.encode_prompt("the") == [*wanted, *tokenizer.encode("the")]
        assert (copy.begin_id, copy.end_ids) == (tokenizer.begin_id, tokenizer.end_ids)
    for directory in ("run", "again"):  # what transformers reads
        written = tokenizers.Tokenizer.from_file(str(tmp_path / directory / "tokenizer.json"))
        assert written.encode("the").ids[: len(wanted) + 1] == [*wanted, tokenizer.encode("the")[0]]


@pytest.mark.parametrize("name", ["byte-level", "gemma", "llama", "llama, metaspace"])
@hypothesis.given(text=st.lists(TEXTS | st.sampled_from(MARKS), max_size=4).map("".join))
@hypothesis.settings(max_examples=25, deadline=None)
def test_ids_and_texts_are_the_same_on_the_way_to_a_gguf_and_back(there_and_back, name, text):
    tokenizer, back = there_and_back[name]
    for special in (True, False):
        ids = tokenizer.encode(text, special)
        assert back.encode(text, special) == ids
        assert back.decode(ids, special) == tokenizer.decode(ids, special)


@pytest.fixture(scope="module")
def there_and_back():
    from opendeep_jax.text.gguf_tokenizer import gguf_fields_of, tokenizer_from_gguf_fields

    found = {}
    for name in ("byte-level", "gemma", "llama", "llama, metaspace"):
        tokenizer = Tokenizer(MADE[name], special={"unk_token": "<unk>"} if name != "byte-level" else {})
        fields = gguf_fields_of(tokenizer, tokenizer.vocab_size + 2)
        found[name] = tokenizer, tokenizer_from_gguf_fields(json.loads(json.dumps(fields)))
    return found


def test_ids_outside_of_the_vocabulary_say_nothing():
    spelling = read_byte_decoder(byte_level())
    assert spelling.text([-1, 10**12, *np.array([0])]) == MADE["byte-level"].decode([0])
