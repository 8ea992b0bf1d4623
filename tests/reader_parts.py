"""What the tests of trained readers share: records with two kinds of answers, a tokenizer, a base, an adapter."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from specrag import Passage
from specrag.evaluation.data import Question
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
