"""Compare what tokenizers say on all our ways with transformers, and with llama.cpp where it is there.

    python benchmarks/tokenizer_agreement.py PATH... [--texts=400] [--reference=PYTHON] [--llama=PYTHON]

Each PATH is a directory with a tokenizer.json, or a .gguf file. From it a text takes these ways: as it is, as an
imported run, as that run's export to Hugging Face, as its export to GGUF, and from there as a run and a directory
again. On each, a seeded set of hostile texts must give the ids, the decoded text, the streamed text, and the begin and
end ids that the first one gives, and so must transformers for each directory (with --reference, a Python that has it)
and llama.cpp for the GGUF (with --llama, a Python that has xllamacpp). The table counts the texts that differ.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from opendeep_jax.text.files import save_tokenizer, tokenizer_from_hf
from opendeep_jax.text.gguf_tokenizer import gguf_fields_of, tokenizer_from_gguf_fields
from opendeep_jax.text.stream import TextStream
from opendeep_jax.text.tokenizer import Tokenizer

PARTS = (
    " ", "  ", "   ", " " * 4, " " * 8, " " * 17, " " * 33, "\t", "\n", "\n\n", "\r\n", "\n\n\n \n", "\u00a0",
    "\u3000", "\u200b", "\u200d", "\ufeff", "\u2028", "\x00", "\x7f", "the", " the", "The quick", " brown fox",
    "jumps.", "don't", " I'VE", "they'll", "'s", "'", '"', "''", "...", "!?", "/*", "//", "\\n", "{}", "[0]",
    "<b>", "&amp;", "::", "->", "==", "    return x_1", "def f(a, b):\n", "0", "7", "42", "123", "1234",
    "12345678", "3.14", "1,000", "²", "½", "Ⅷ", "٣", "९", "é", "e\u0301", "Å", "A\u030a", "ñandú", "naïve",
    "Straße", "ﬁ", "İ", "ΑΣ", "нещо", " Българ", "שלום", "مرحبا", "नमस्ते", "สวัสดี", "ខ្មែរ", "አማርኛ", "བོད",
    "我想在", "苹果", "、。", "数据", "こんにちは", "カタカナ", "안녕", "한글", "～", "！", "🚀", "👩‍👩‍👧",
    "🇫🇷", "😶‍🌫️", "\U0001f9d1\U0001f3fd", "𝔘𝔫", "𐐀", "\U000e0041", "\ue000", "\ufffd", "▁", "▁▁", "Ġ", "Ċ",
    "##x", "</w>", "<0x0A>", "<unk>", "<s>", "</s>", "<|endoftext|>", "<|im_end|>", "<|eot_id|>",
    "<end_of_turn>", "<bos>", "<think>", "<｜end▁of▁sentence｜>", "<｜User｜>", "a" * 50, "ab" * 30,
    "camelCaseHTML", "http://a.b/c?d=e", "x" * 3 + "y" * 3, "ＡＢＣ",
)  # fmt: skip
TRANSFORMERS = """
import json, sys, logging
import transformers
transformers.logging.set_verbosity_error()
asked = json.load(open(sys.argv[1]))
found = {}
for name, directory in asked["directories"].items():
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    ids = [tokenizer(text)["input_ids"] for text in asked["texts"]]
    plain = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in asked["texts"]]
    ends = [tokenizer.eos_token_id]
    try:
        more = transformers.GenerationConfig.from_pretrained(directory).eos_token_id
        ends += more if isinstance(more, list) else [more]
    except OSError:
        pass
    found[name] = {
        "ids": ids,
        "texts": [tokenizer.decode(one, skip_special_tokens=True) for one in plain],
        "ends": sorted({one for one in ends if one is not None}),
    }
json.dump(found, open(sys.argv[2], "w"))
"""
LLAMA = """
import json, sys, urllib.request
import xllamacpp
asked = json.load(open(sys.argv[1]))
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.warmup, params.n_gpu_layers = asked["gguf"], 64, False, 0
params.cpuparams.n_threads = 1
server = xllamacpp.Server(params)

def post(path, body):
    request = urllib.request.Request(server.listening_address + path, json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    return json.load(urllib.request.urlopen(request))

body = {"add_special": True, "parse_special": True}
ids = [post("/tokenize", body | {"content": text})["tokens"] for text in asked["texts"]]
plain = [post("/tokenize", {"content": text, "parse_special": False})["tokens"] for text in asked["texts"]]
texts = [post("/detokenize", {"tokens": one})["content"] for one in plain]
json.dump({"ids": ids, "plain": plain, "texts": texts}, open(sys.argv[2], "w"))
sys.stdout.flush()
import os
os._exit(0)
"""


def hostile_texts(count: int, seed: int = 0) -> list[str]:
    """Texts of parts that tokenizers treat specially, in any order."""
    draw = random.Random(seed)
    return ["", " ", *("".join(draw.choices(PARTS, k=draw.randint(1, 14))) for _ in range(count - 2))]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="+")
    parser.add_argument("--texts", type=int, default=400)
    parser.add_argument("--reference", default="")
    parser.add_argument("--llama", default="")
    options = parser.parse_args()
    texts = hostile_texts(options.texts)
    rows = [("tokenizer", "way", "ids", "text", "stream", "begin", "ends", "bytes")]
    for path in map(Path, options.paths):
        with tempfile.TemporaryDirectory() as directory:
            for row in compare(path, texts, Path(directory), options.reference, options.llama):
                rows.append(row)
                print(*row, file=sys.stderr)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def compare(path: Path, texts: list[str], directory: Path, reference: str, llama: str):
    """Rows of the table for one tokenizer."""
    name = path.stem if path.suffix == ".gguf" else path.resolve().parent.name if path.name == "models" else path.name
    if path.suffix == ".gguf":
        from opendeep_jax.interop.gguf_file import read_gguf

        first = tokenizer_from_gguf_fields(read_gguf(path).fields)
    else:
        first = tokenizer_from_hf(path)
    run = tokenizer_from_hf(save_tokenizer(first, directory / "run").parent)
    exported = tokenizer_from_hf(save_tokenizer(run, directory / "hf").parent)
    fields = gguf_fields_of(run, run.vocab_size)
    back = tokenizer_from_gguf_fields(json.loads(json.dumps(fields)))
    again = tokenizer_from_hf(save_tokenizer(back, directory / "again").parent)
    ways = {"as it is": first, "run": run, "hf": exported, "gguf": back, "gguf, run, hf": again}
    wanted = said(first, texts)
    lengths = [sum(first.byte_decoder.lengths(ids)) for ids in wanted[0]]
    lost = count(lengths, [len(text.encode()) for text in texts])
    for way, tokenizer in ways.items():
        found = said(tokenizer, texts)
        differ = map(count, found, wanted)
        begins, ends = tokenizer.with_prefix([]), sorted(tokenizer.end_ids)
        same = "same" if begins == first.with_prefix([]) else str(begins)
        yield name, way, *differ, same, "same" if ends == sorted(first.end_ids) else str(ends), lost
    if reference:
        directories = {"as it is": path} if path.is_dir() else {}
        directories |= {"run": directory / "run", "hf": directory / "hf", "gguf, run, hf": directory / "again"}
        asked = {"texts": texts, "directories": {way: str(one.resolve()) for way, one in directories.items()}}
        for way, found in ask(reference, TRANSFORMERS, asked, directory).items():
            tokenizer = ways[way]
            ids = [[*tokenizer.with_prefix([]), *tokenizer.encode(text, special=True)] for text in texts]
            begin = begin_of(found["ids"][0], tokenizer)
            yield (
                name, f"transformers, {way}",
                count(behind(found["ids"], begin), behind(ids, tokenizer.with_prefix([]))),
                count(found["texts"], [tokenizer.decode(tokenizer.encode(text, special=True)) for text in texts]), "",
                "same" if begin == tokenizer.with_prefix([]) else f"{begin} for {tokenizer.with_prefix([])}",
                "same" if set(found["ends"]) <= set(tokenizer.end_ids) else str(found["ends"]), "",
            )  # fmt: skip
    if llama:
        file = directory / "tiny.gguf"
        write_tiny(run, fields, file)
        found = ask(llama, LLAMA, {"texts": texts, "gguf": str(file)}, directory)
        ids = [[*back.with_prefix([]), *back.encode(text, special=True)] for text in texts]
        begin = begin_of(found["ids"][0], back)
        plain = [back.encode(text) for text in texts]
        spoken = [b"".join(map(back.piece, one)).decode("utf-8", "replace") for one in plain]
        matching = [i for i in range(len(texts)) if plain[i] == found["plain"][i]]
        yield (
            name, "llama.cpp, gguf",
            f"{count(behind(found['ids'], begin), behind(ids, back.with_prefix([])))}, "
            f"{count(found['plain'], plain)} plain",
            count([found["texts"][i] for i in matching], [spoken[i] for i in matching]), "",
            "same" if begin == back.with_prefix([]) else f"{begin} for {back.with_prefix([])}", "", "",
        )  # fmt: skip


def said(tokenizer: Tokenizer, texts: list[str]) -> tuple[list, list, list]:
    """Ids, decoded and streamed texts; what the library decodes stands in for a decoded text that is another."""
    ids = [tokenizer.encode(text) for text in texts]
    library = [tokenizer.library.decode(one, skip_special_tokens=True) for one in ids]
    streamed = []
    for one in ids:
        stream = TextStream(tokenizer)
        streamed.append("".join(stream.push([i]) for i in one) + stream.finish())
    decoded = [tokenizer.decode(one) for one in ids]
    bad = [i for i in range(len(ids)) if not decoded[i] == library[i] == streamed[i]]
    for i in bad:
        streamed[i] = f"differs: {streamed[i]}"
    return ids, decoded, streamed


def count(one: list, other: list) -> str:
    """How many differ."""
    return str(sum(a != b for a, b in zip(one, other, strict=True)))


def begin_of(ids: list[int], tokenizer: Tokenizer) -> list[int]:
    """What an empty text begins with, for a program that adds no end."""
    return [i for i in ids if i in tokenizer.special_ids]


def behind(ids: list[list[int]], begin: list[int]) -> list[list[int]]:
    """Ids without the begin, once."""
    return [one[len(begin) :] if begin and one[: len(begin)] == begin else one for one in ids]


def ask(python: str, program: str, asked: dict, directory: Path):
    """What another Python's program answers."""
    (directory / "asked.json").write_text(json.dumps(asked))
    command = [python, "-c", program, str(directory / "asked.json"), str(directory / "found.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return json.loads((directory / "found.json").read_text())


def write_tiny(tokenizer: Tokenizer, fields: dict, path: Path) -> None:
    """A GGUF with a tokenizer and the smallest model that llama.cpp starts with."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    for add, value in (
        (writer.add_context_length, 64), (writer.add_embedding_length, 32), (writer.add_feed_forward_length, 32),
        (writer.add_head_count, 1), (writer.add_head_count_kv, 1), (writer.add_layer_norm_rms_eps, 1e-5),
        (writer.add_rope_dimension_count, 32), (writer.add_vocab_size, tokenizer.vocab_size),
    ):  # fmt: skip
        add(value)
    for key, value in fields.items():
        match value:
            case bool():
                writer.add_bool(key, value)
            case int():
                writer.add_uint32(key, value)
            case str():
                writer.add_string(key, value)
            case _:
                writer.add_array(key, list(value))
    shapes = {f"blk.0.{part}.weight": (32, 32) for part in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_up")}
    shapes |= {f"blk.0.{part}.weight": (32, 32) for part in ("ffn_down", "ffn_gate")}
    shapes |= {f"{part}.weight": (32,) for part in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm")}
    shapes |= {"token_embd.weight": (tokenizer.vocab_size, 32)}
    for name, shape in shapes.items():
        kind = np.float16 if len(shape) == 2 else np.float32
        writer.add_tensor(name, np.full(shape, 0.01, kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
