"""The sample models' tokenizer: byte-level BPE, lossless on any text."""

from pathlib import Path

from sample_models import FOLDERS, SHAPE, write_json
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

LANGUAGES = ("en", "zh")

# <unk> doubles as padding, as in the published ERNIE-4.5.
SPECIALS = ("<unk>", "<s>", "</s>", "<|begin_of_sentence|>", "<|end_of_sentence|>")


def read_texts(folder, part):
    return {x: (Path(folder) / f"{part}.{x}.txt").read_text("utf-8") for x in LANGUAGES}


def train_tokenizer(text_folder, out):
    """Byte-level BPE; the Chinese text, half as long, is counted twice."""
    texts = read_texts(text_folder, "train")
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SHAPE["vocab_size"],
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([texts["en"], texts["zh"], texts["zh"]], trainer)
    assert tokenizer.get_vocab_size() == SHAPE["vocab_size"]
    for part in ("train", "heldout"):
        for text in read_texts(text_folder, part).values():
            ids = tokenizer.encode(text).ids
            assert tokenizer.decode(ids) == text
    for folder in FOLDERS.values():
        (out / folder).mkdir(parents=True, exist_ok=True)
        tokenizer.save(str(out / folder / "tokenizer.json"))
        write_tokenizer_config(out / folder)


def write_tokenizer_config(folder):
    names = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<unk>",
    }
    extra = {"additional_special_tokens": list(SPECIALS[3:])}
    write_json(folder / "special_tokens_map.json", {**names, **extra})
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **names,
        **extra,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": SHAPE["max_position_embeddings"],
        "padding_side": "left",
    }
    write_json(folder / "tokenizer_config.json", config)
