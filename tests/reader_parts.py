"""What the tests of trained readers share: records with two kinds of answers, a tokenizer, a base, an adapter."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from specrag import Passage
from specrag.evaluation.data import Question
from specrag.models.bundled import READER_SETTINGS, located
from specrag.models.reader import ADAPTER_FILE, load_encoder
from tests.test_span_reader import tiny_bert

CITIES = ("paris", "rome", "oslo", "bern", "ulm", "lima", "cairo", "tokyo")


def records(count: int = 24) -> list[Question]:
    """Every passage names a year and a city; the question says which of the two is asked for."""
    made = []
    for i in range(count):
        year, city = 1800 + 7 * i, CITIES[i % len(CITIES)]
        text = f"Tower {i} is tall. It was built in {year} by the people of {city}. It stands."
        asked, answer = (f"when was tower {i} built", str(year)) if i % 2 else (f"who built tower {i}", city)
        made.append(Question(str(i), asked, (answer,), (Passage(text, title=f"Tower {i}"),), (0,)))
    return made


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Every word of the records is a token: a tiny vocabulary, so that training takes a moment."""
    words = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    words.normalizer, words.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    texts = [text for record in records() for text in (record.question, record.passages[0].text)]
    words.train_from_iterator(texts, trainers.WordLevelTrainer(special_tokens=special))
    words.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def tiny_base(folder: Path) -> Path:
    """A folder with a tiny encoder and ``word_tokenizer``."""
    tokenizer = word_tokenizer()
    tiny_bert(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def reader_in_place(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A reader of the real MiniLM in the place of the package's: its head is random."""
    reader = folder / "minilm-reader"
    reader.mkdir()
    torch.manual_seed(1)
    model, _ = load_encoder(located("minilm"))
    head = {name: p.detach().half() for name, p in model.named_parameters() if name.startswith("qa_outputs")}
    save_file(head, reader / ADAPTER_FILE)
    (reader / READER_SETTINGS).write_text(json.dumps({"base": "minilm", "longest": 9, "trained on": "nothing"}))
    module = importlib.import_module("specrag.models.bundled")  # `specrag.models.bundled` is the function
    monkeypatch.setattr(module, "adapter_folder", lambda name: folder / name)
    return reader
