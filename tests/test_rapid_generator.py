"""RapidGenerator and its settings."""

import pytest
import torch

from specrag.errors import InvalidInputError
from specrag.models import Sampling
from specrag.rapid import LongContext, Message, RapidChat, RapidGenerator, RapidSettings
from tests.rapid_parts import DOCUMENT, generator


def test_chat_messages_the_last_user_turn_is_the_query(tiny):
    rapid = generator(tiny, transfer="none", candidates=3)
    messages = [{"role": "user", "content": DOCUMENT}, {"role": "assistant", "content": "Read."}]
    out = rapid.generate([*messages, {"role": "user", "content": "who?"}], max_tokens=12)
    rendered = tiny.tokenizer.apply_chat_template(
        [*messages, {"role": "user", "content": "who?"}], tokenize=False, add_generation_prompt=True
    )
    cut = rendered.rindex("who?")
    ids = torch.tensor([tiny.encoder.encode_text(rendered[:cut]) + tiny.encoder.encode_text(rendered[cut:])])
    with torch.inference_mode():
        made = tiny.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=0
        )
    assert out.text == tiny.tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
    with pytest.raises(InvalidInputError, match="last message must be the user's"):
        rapid.generate(messages)
    with pytest.raises(InvalidInputError, match="no context before the query"):
        rapid.generate([{"role": "user", "content": "who?"}])


def test_different_tokenizers_are_refused(tiny, wordpiece_lm):
    with pytest.raises(InvalidInputError, match="RAPID needs one tokenizer for both"):
        RapidGenerator(tiny, wordpiece_lm)


# --- settings -------------------------------------------------------------------------------------------


def test_settings_come_as_a_value_as_a_mapping_or_one_by_one(tiny):
    wanted = RapidSettings(candidates=(2, 3), proposer="match", sampling=Sampling(top_p=0.9, temperature=1.0))
    mapping = {"candidates": [2, 3], "proposer": "match", "sampling": {"top_p": 0.9}}
    for rapid in (
        RapidGenerator(tiny, settings=wanted),
        RapidGenerator(tiny, settings=mapping),
        RapidGenerator(tiny, **mapping),
        RapidGenerator(tiny, None, RapidSettings(candidates=[2, 3]), proposer="match", sampling={"top_p": 0.9}),
    ):
        assert rapid.settings == wanted
    assert RapidSettings.of(wanted.to_dict()) == wanted
    assert wanted.with_sampling(seed=4, top_p=None).sampling == Sampling(top_p=0.9, temperature=1.0, seed=4)


def test_the_strength_auto_follows_the_retrievals_confidence():
    auto = RapidSettings(transfer_strength="auto")
    assert [auto.knowledge_transfer(c).strength for c in (0.0, 0.5, 1.0)] == [0.0, 5.0, 10.0]
    assert RapidSettings(transfer_strength=7.0).knowledge_transfer(0.5).strength == 7.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"transfer_strength": -1.0}, "transfer strength must be 0 or more"),
        ({"transfer_strength": "much"}, "a number or 'auto'"),
        ({"sampling": {"temperature": -1.0}}, "temperature must be 0"),
        ({"sampling": {"top_p": 0.0}}, "top_p must be in"),
        ({"sampling": 0.5}, "sampling must be a Sampling"),
        ({"sampling": {"top_x": 1}}, "unknown settings top_x: Sampling has temperature, top_k, top_p, seed"),
        ({"candidates": -1}, "candidates must be 0 or more"),
        ({"candidates": "many"}, "a number, a schedule or 'auto'"),
        ({"transfer": "all"}, "transfer must be one of"),
        ({"tail": "fat"}, "tail must be one of"),
        ({"proposer": "oracle"}, "proposer must be"),
        ({"retrieval_budget": 0}, "retrieval_budget must be at least 1"),
        ({"candidate": 3}, "unknown settings candidate: RapidSettings has candidates, transfer,"),
        ({"temperature": 0}, "temperature, top_k, top_p and seed are fields of sampling="),
        ({"settings": 3}, "settings must be RapidSettings or a mapping"),
    ],
)
def test_settings_are_checked_at_construction(tiny, settings, message):
    with pytest.raises(InvalidInputError, match=message):
        RapidGenerator(tiny, **settings)


def test_a_misspelt_argument_is_an_error_wherever_rapid_takes_settings(tiny):
    rapid = generator(tiny, candidates=0)
    session, chat = LongContext("A text.", rapid), RapidChat(rapid)
    for call in (
        lambda: RapidSettings(candidate=3),
        lambda: LongContext("A text.", rapid, max_token=3),
        lambda: session.ask("who?", max_token=3),
        lambda: session.retrieve("who?", budget=3),
        lambda: RapidChat(rapid, session=3),
        lambda: RapidChat.open(rapid=rapid, temprature=0.5),
        lambda: chat.complete([Message("user", "who?")], max_token=3),
        lambda: rapid.generate([{"role": "user", "content": c} for c in "ab"], max_token=3),
    ):
        with pytest.raises(TypeError, match="unexpected keyword argument"):
            call()
    assert session.ask("who?", max_tokens=2).stats.tokens == 2
