"""Both tokenizer files, alone and against each other."""

import io
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from numpy_ref.checkpoint import SHIPPED, load_config
from numpy_ref.errors import PaliGemmaError
from numpy_ref.tokenizer import LOCATIONS, SEGMENTS, Json, SentencePiece, Stream, Tokenizer, known_ids, prompt_warning
from numpy_ref.tokenizer.convert import convert

from .models import CONFIGS

CONFIG = load_config(SHIPPED)
MODEL = SentencePiece((SHIPPED / "tokenizer.model").read_bytes())
TOKENIZERS = {
    "model": Tokenizer(MODEL, CONFIG),
    "json": Tokenizer(Json((SHIPPED / "tokenizer.json").read_bytes()), CONFIG),
}
TEXTS = ["caption en", "detect red star ; blue circle", "two  spaces", " leading", "trailing ", "tab\tnew\nline",
         "naïve café ☕ 日本", "<loc0007><loc1023> <seg127>", "a<loc0001>b", "2026", "<unused> <br>"]  # fmt: skip


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(st.text())
def test_both_files_are_one_tokenizer(text):
    ids = TOKENIZERS["model"].encode(text)
    assert TOKENIZERS["json"].encode(text) == ids
    assert TOKENIZERS["json"].decode(ids) == TOKENIZERS["model"].decode(ids)


def test_sizes_agree(tokenizer):
    assert tokenizer.size == CONFIG.image_token
    assert len(tokenizer.content) == 1024 + 128
    assert tokenizer.known().sum() == tokenizer.size
    assert tokenizer.newline == [4]


@pytest.mark.parametrize("word", ["<image>", "<bos>", "<eos>", "<pad>", "<unk>"])
def test_control_words_are_spelled(tokenizer, word):
    ids = tokenizer.encode(f"say {word} now")
    control = {CONFIG.image_token, CONFIG.bos, CONFIG.eos, CONFIG.pad, 3}
    assert not control & set(ids)
    assert tokenizer.decode(ids) == f"say {word} now"


def test_control_ids_leave_no_trace(tokenizer):
    ids = tokenizer.encode("red star")
    assert tokenizer.decode([CONFIG.bos, *ids, CONFIG.eos, CONFIG.pad, CONFIG.image_token, 10**6]) == "red star"


def test_the_prompt(tokenizer):
    prompt = tokenizer.prompt("caption en")
    patches = CONFIG.vision.patches
    assert prompt == [CONFIG.image_token] * patches + [CONFIG.bos, *tokenizer.encode("caption en"), 4]


def test_the_newline_is_a_token_of_its_own(tokenizer):
    """big_vision tokenises prefix and newline apart; jointly, a trailing blank could join them."""
    assert tokenizer.prompt("a \n")[-2:] == [4, 4]


def test_streaming_never_shows_half_a_character(tokenizer):
    text, stream = "naïve ☕ 日本", Stream(tokenizer)
    shown = [stream.push(token) for token in tokenizer.encode(text)] + [stream.close()]
    assert "".join(shown) == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in shown)


def test_a_broken_character_is_shown_at_the_end():
    tokenizer = TOKENIZERS["model"]
    stream = Stream(tokenizer)
    first_byte = tokenizer.encode("☕")[0]
    assert stream.push(first_byte) == ""
    assert stream.close() == "\N{REPLACEMENT CHARACTER}"


@given(st.lists(st.integers(0, CONFIG.text.vocab)))
def test_any_ids_decode_alike(ids):
    """Bytes that make no character included; and a stream shows in the end what decoding at once does."""
    texts = []
    for tokenizer in TOKENIZERS.values():
        stream = Stream(tokenizer)
        texts += [tokenizer.decode(ids), "".join([stream.push(token) for token in ids] + [stream.close()])]
    assert len(set(texts)) == 1


def test_a_cut_character_costs_no_other(tokenizer):
    """An answer may end in the middle of a character that takes several byte tokens."""
    ids = tokenizer.encode("日本")
    assert len(ids) == 6
    assert tokenizer.decode(ids[:4]) == "日\N{REPLACEMENT CHARACTER}"


def test_text_that_is_not_unicode(tokenizer):
    with pytest.raises(PaliGemmaError, match="not valid Unicode"):
        tokenizer.encode("caption \udcff")


@pytest.mark.parametrize("word", ["<image>", "<bos>", "<eos>", "<pad>", "<unk>"])
def test_control_words_declared_as_text_are_spelled_too(word):
    contents = json.loads((SHIPPED / "tokenizer.json").read_bytes())
    entry = next(entry for entry in contents["added_tokens"] if entry["content"] == word)
    entry["special"] = False
    tokenizer = Tokenizer(Json(json.dumps(contents).encode()), CONFIG)
    assert entry["id"] not in tokenizer.encode(f"say {word}{word} now")
    assert tokenizer.decode([*tokenizer.encode(f"say {word}"), entry["id"]]) == f"say {word}"


TRAINING_TEXTS = ["the cat sat on the mat and the dog", "detect red star ; blue circle", "naïve café, 2026"] * 20


def train(*user_defined, texts=TRAINING_TEXTS, **settings) -> bytes:
    """A SentencePiece model set up as Gemma's is, which ends before the location tokens."""
    model = io.BytesIO()
    settings = {
        "model_type": "bpe",
        "add_dummy_prefix": False,
        "normalization_rule_name": "identity",
        "vocab_size": 330,
        "byte_fallback": True,
        "unk_piece": "<unk>",
        **settings,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model,
        remove_extra_whitespaces=False, split_digits=True, num_threads=1, minloglevel=2,
        allow_whitespace_only_pieces=True, pad_id=0, eos_id=1, bos_id=2, unk_id=3,
        pad_piece="<pad>", eos_piece="<eos>", bos_piece="<bos>",
        user_defined_symbols=["<mask>", "\n", *user_defined], **settings,
    )  # fmt: skip
    return model.getvalue()


def behind(size):
    """A config whose vocabulary is `size` pieces, the location tokens, the image token and noise, as in the releases."""
    return replace(CONFIG, text=replace(CONFIG.text, vocab=size + 1152 + 64), image_token=size + 1152)


def test_an_image_piece_is_spelled():
    tokenizer = Tokenizer(SentencePiece(train("<image>")), behind(330))
    image = tokenizer.backend.find("<image>")
    assert image is not None
    assert image not in tokenizer.encode("an <image> here")


def test_what_ships_is_what_conversion_makes():
    made = convert((SHIPPED / "tokenizer.model").read_bytes(), CONFIG)
    assert json.loads(made) == json.loads((SHIPPED / "tokenizer.json").read_bytes())


@pytest.fixture(scope="module")
def made():
    """A model as Google's, which ends before the location tokens, and the tokenizer.json that is made of it."""
    model = train(*("▁" * i for i in range(2, 16)), "<table>")
    config = behind(SentencePiece(model).size)
    return Tokenizer(SentencePiece(model), config), Tokenizer(Json(convert(model, config)), config)


@given(
    st.lists(
        st.sampled_from([*"<>;, 7aeé日☕", "the", "cat", "  ", "\n", "<bos>", "<table>", "<loc0003>", "<seg127>"]),
        max_size=7,
    )
)
def test_what_conversion_makes_spells_alike(made, pieces):
    model, other = made
    assert other.encode("".join(pieces)) == model.encode("".join(pieces))
    assert other.content == model.content
    assert (other.known() == model.known()).all()


def test_an_unknown_piece_of_another_name_and_no_bytes():
    """Text that the model cannot spell is unknown to both, or there is no conversion; nothing is raised."""
    model = train(unk_piece="[UNK]", byte_fallback=False, vocab_size=70)
    made = convert(model, behind(SentencePiece(model).size))
    assert made is None or b"[UNK]" in made


@pytest.mark.parametrize(
    "setting",
    [{"model_type": "unigram", "vocab_size": 290}, {"add_dummy_prefix": True}, {"normalization_rule_name": "nmt_nfkc"}],
)
def test_models_that_do_not_convert(setting):
    model = train(**setting)
    assert convert(model, behind(SentencePiece(model).size)) is None


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """The model, and the tokenizer.json that transformers makes of it, by its own conversion."""
    transformers = pytest.importorskip("transformers", reason="the live comparison needs transformers")
    folder, model = tmp_path_factory.mktemp("tokenizer"), train()
    (folder / "tokenizer.model").write_bytes(model)
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GemmaTokenizer"}))
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    theirs.add_tokens(LOCATIONS + SEGMENTS)
    theirs.add_special_tokens({"additional_special_tokens": ["<image>"]})
    theirs.save_pretrained(folder / "json")
    size = SentencePiece(model).size
    ours = Tokenizer(SentencePiece(model), behind(size)), Tokenizer.load(folder / "json", behind(size))
    assert isinstance(ours[1].backend, Json)
    return *ours, theirs


WORDS = [
    "the",
    "cat",
    " ",
    "  ",
    "\n",
    "\t",
    "▁",
    "é",
    "日",
    "☕",
    "7",
    "<bos>",
    "<image>",
    "<unk>",
    "<loc0003>",
    "<seg127>",
    "<",
]


@pytest.mark.filterwarnings("ignore")
@given(st.lists(st.sampled_from(WORDS), max_size=12).map("".join))
def test_the_file_that_transformers_makes(converted, text):
    model, other, theirs = converted
    ids = model.encode(text)
    assert other.encode(text) == ids
    assert other.decode(ids) == model.decode(ids) == text.replace("▁", " ")
    if not any(word in text for word in ("<bos>", "<image>", "<unk>")):  # which it obeys
        assert theirs.encode(text, add_special_tokens=False) == ids


@pytest.mark.filterwarnings("ignore")
def test_the_layout_that_transformers_makes(converted):
    model, other, _ = converted
    assert model.size == other.size == model.config.image_token
    assert model.content == other.content
    assert other.backend.find("<image>") == other.config.image_token
    assert (model.known() == other.known()).all()
    assert model.known().sum() == model.size


def test_control_tokens_past_the_image_are_not_known():
    """transformers adds a mask token of its own to a file that has none."""
    contents = json.loads((SHIPPED / "tokenizer.json").read_bytes())
    last = contents["added_tokens"][-1]
    assert last["content"] == "<image>"
    contents["added_tokens"].append(last | {"content": "<mask>", "id": last["id"] + 1})
    tokenizer = Tokenizer(Json(json.dumps(contents).encode()), CONFIG)
    assert tokenizer.size == CONFIG.image_token
    assert not tokenizer.known()[CONFIG.image_token :].any()


# --- against transformers ----------------------------------------------------------------------------------

SCRIPTS = [
    (0x20, 0x7E), (0xA0, 0x24F), (0x300, 0x36F), (0x370, 0x3FF), (0x400, 0x4FF), (0x590, 0x5FF), (0x600, 0x6FF),
    (0x900, 0x97F), (0xE00, 0xE7F), (0x1100, 0x11FF), (0x2000, 0x206F), (0x3040, 0x30FF), (0x4E00, 0x9FFF),
    (0xAC00, 0xD7A3), (0xFE00, 0xFE0F), (0xFFF0, 0xFFFF), (0x1D400, 0x1D7FF), (0x1F300, 0x1FAFF), (0, 0x1F),
    (0x7F, 0x9F),
]  # fmt: skip
OBEYED = ["<bos>", "<eos>", "<pad>", "<unk>", "<image>"]
SPELLED = [
    "<table>", "<start_of_turn>", "<loc0000>", "<loc1023>", "<loc1024>", "<loc9999>", "<loc12>", "<seg000>",
    "<seg127>", "<seg128>", "<seg999>", "<0x0A>", "<0x41>", "▁", "the", "cat", " ; ", "  ", "    ", "\n", "\n\n\n",
    "\r\n", "\t", "\t\t", "\u3000", "\ufeff", "\u200d", "<", " <",
]  # fmt: skip


def random_text(rng, words) -> str:
    """Up to twelve pieces: words, and letters of one script each."""

    def piece():
        if rng.random() < 0.4:
            return words[rng.integers(len(words))]
        first, last = SCRIPTS[rng.integers(len(SCRIPTS))]
        return "".join(map(chr, rng.integers(first, last + 1, rng.integers(1, 5))))

    return "".join(piece() for _ in range(rng.integers(1, 13)))


@pytest.fixture(scope="module")
def gemma_like(tmp_path_factory):
    """A model with Gemma's layout and its runs of blanks, tabs and line breaks; ours, and transformers' reading."""
    transformers = pytest.importorskip("transformers", reason="the live comparison needs transformers")
    runs = [letter * i for letter in "▁\n\t" for i in range(2, 16)]
    folder, model = tmp_path_factory.mktemp("gemma_like"), train(*runs, "<table>", "<start_of_turn>", vocab_size=400)
    (folder / "tokenizer.model").write_bytes(model)
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GemmaTokenizer"}))
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    theirs.add_tokens(LOCATIONS + SEGMENTS)
    theirs.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return Tokenizer(SentencePiece(model), behind(SentencePiece(model).size)), theirs


@pytest.fixture(params=["shipped", "gemma_like"])
def both(request):
    """Our tokenizer and transformers' for the same file."""
    if request.param == "gemma_like":
        return request.getfixturevalue("gemma_like")
    transformers = pytest.importorskip("transformers", reason="the live comparison needs transformers")
    return TOKENIZERS["model"], transformers.AutoTokenizer.from_pretrained(SHIPPED)


@pytest.mark.filterwarnings("ignore")
def test_texts_of_all_scripts_as_transformers(both):
    """The same ids, but for control words: transformers obeys them unless told to split them.

    Gemma's `<mask>` is one token to both, which is no control word; to a file without it transformers adds one.
    """
    ours, theirs = both
    mask = [] if ours.backend.find("<mask>") is None else ["<mask>"]
    rng = np.random.default_rng(0)
    for words, settings in [(SPELLED + mask, {}), (SPELLED + OBEYED, {"split_special_tokens": True})]:
        for _ in range(3000):
            text = re.sub("▁ +| +▁", "▁", random_text(rng, words))
            assert ours.encode(text) == theirs.encode(text, add_special_tokens=False, **settings), text


@pytest.mark.filterwarnings("ignore")
def test_the_documented_differences(both, gemma_like):
    """Control words, and a "▁" typed beside a space: SentencePiece takes it for one, transformers finds it first."""
    ours, theirs = gemma_like
    assert ours.encode("▁▁ a") == ours.encode("   a") != theirs.encode("▁▁ a", add_special_tokens=False)
    ours, theirs = both
    for word in OBEYED:
        assert theirs.encode(f"a{word}b", add_special_tokens=False) != ours.encode(f"a{word}b")


@pytest.mark.filterwarnings("ignore")
def test_prompts_of_all_scripts_as_transformers(gemma_like):
    """Its processor joins prefix and newline before it splits them, so a line break at the end is the other difference.

    There it finds a piece of several line breaks where big_vision, and we, have one more newline token.
    """
    import transformers
    from PIL import Image

    ours, theirs = gemma_like
    pictures = transformers.AutoProcessor.from_pretrained(SHIPPED, backend="pil").image_processor
    processor = transformers.PaliGemmaProcessor(pictures, theirs)
    rng, picture = np.random.default_rng(1), Image.new("RGB", (9, 9))
    for _ in range(300):
        text = re.sub("▁ +| +▁", "▁", random_text(rng, SPELLED))
        ids = processor(images=picture, text=f"<image>{text}")["input_ids"][0]
        assert (ids == ours.prompt(text)) != text.endswith("\n"), text


@pytest.mark.parametrize("word", ["<loc1024>", "<loc9999>", "<seg128>", "<seg999>"])
def test_numbers_past_the_last_are_text(word):
    """Spelled with what stands around them, not cut out of it: here " <" and "> " are pieces."""
    texts = ["the <5mm> cat", "a <br> b", "dog <b> cat"] * 50
    model = train(vocab_size=285, texts=texts)
    ours = Tokenizer(SentencePiece(model), behind(SentencePiece(model).size))
    around = f"cat {word} dog"
    assert ours.encode(around) == ours.backend.encode(around)
    assert ours.encode(around) != ours.encode("cat ") + ours.encode(word) + ours.encode(" dog")
    made = Tokenizer(Json(convert(model, ours.config)), ours.config)
    assert made.encode(around) == ours.encode(around)


def test_a_tokenizer_without_location_tokens_cuts_nothing():
    model = train(vocab_size=330)
    bare = replace(CONFIG, text=replace(CONFIG.text, vocab=331), image_token=330)
    tokenizer = Tokenizer(SentencePiece(model), bare)
    assert not tokenizer.content
    assert tokenizer.encode("a <loc0007> b") == tokenizer.backend.encode("a <loc0007> b")


def test_a_byte_order_mark_is_no_part_of_a_file():
    contents = (SHIPPED / "tokenizer.json").read_bytes()
    assert Tokenizer(Json(b"\xef\xbb\xbf" + contents), CONFIG).encode("cat") == TOKENIZERS["json"].encode("cat")


@pytest.mark.parametrize("prompt", ["<image>caption en", " <image><bos>caption en", "<bos>caption en"])
def test_picture_tokens_in_front_are_warned_of(prompt):
    warning = prompt_warning(prompt)
    assert "leave it out" in warning
    assert warning.splitlines() == [warning]


def test_other_prompts_are_not():
    assert not any(map(prompt_warning, ["caption en", "what is <image>?", "<loc0001> what", "", "<images>"]))


class WithoutContent(SentencePiece):
    """Stands for Google's own file, which ends before the location tokens."""

    def find(self, piece):
        return None


def test_location_tokens_behind_the_end():
    size = MODEL.size
    vision_text = replace(CONFIG.text, vocab=size + 1152 + 64)
    config = replace(CONFIG, text=vision_text, image_token=size + 1152)
    tokenizer = Tokenizer(WithoutContent((SHIPPED / "tokenizer.model").read_bytes()), config)
    assert [tokenizer.content[LOCATIONS[0]], tokenizer.content[SEGMENTS[-1]]] == [size, size + 1151]
    assert tokenizer.decode([size + 5, size + 1024]) == "<loc0005><seg000>"
    known = tokenizer.known()
    assert known[: size + 1152].all()
    assert not known[size + 1152 :].any()  # the image token, and the random rows behind it


def test_ids_without_a_tokenizer():
    config = CONFIGS["paligemma1"]
    padded = replace(config, text=replace(config.text, vocab=64), image_token=50)
    assert known_ids(padded).tolist() == [True] * 50 + [False] * 14
    inside = replace(config, text=replace(config.text, vocab=300), image_token=50)
    assert known_ids(inside).sum() == 299


def test_bad_files(tmp_path):
    with pytest.raises(PaliGemmaError, match=r"neither tokenizer\.model nor tokenizer\.json"):
        Tokenizer.load(tmp_path, CONFIG)
    for name, reason in [("tokenizer.json", "not a tokenizer"), ("tokenizer.model", "not a SentencePiece model")]:
        (tmp_path / name).write_bytes(b"{}!")
        with pytest.raises(PaliGemmaError, match=f"{name}: {reason}"):
            Tokenizer.load(tmp_path, CONFIG)
    with pytest.raises(PaliGemmaError, match="1600 ids but the model only 53"):
        Tokenizer.load(SHIPPED, CONFIGS["paligemma1"])


@pytest.mark.filterwarnings("ignore")
def test_transformers_reads_the_same_tokenizer():
    transformers = pytest.importorskip("transformers", reason="the live comparison needs transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(SHIPPED)
    for text in TEXTS:
        assert theirs.encode(text, add_special_tokens=False) == TOKENIZERS["model"].encode(text)
    assert theirs.convert_tokens_to_ids("<image>") == CONFIG.image_token


@pytest.mark.filterwarnings("ignore")
def test_transformers_prepares_the_same_input():
    """Its processor gives the same ids and, with the Pillow backend, the same pixels."""
    from PIL import Image

    from numpy_ref.image import preprocess

    transformers = pytest.importorskip("transformers", reason="the live comparison needs transformers")
    processor = transformers.AutoProcessor.from_pretrained(SHIPPED, use_fast=False)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (37, 91, 3), np.uint8))
    theirs = processor(images=image, text="<image>caption en", return_tensors="np")
    assert theirs["input_ids"][0].tolist() == TOKENIZERS["model"].prompt("caption en")
    ours = preprocess(image, CONFIG.vision.image_size)
    assert np.abs(theirs["pixel_values"] - ours).max() <= 1.01 * 2 / 255  # one step of 255; torchvision rounds apart
