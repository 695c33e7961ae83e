"""Replies of the base: as greedy as it gets, nothing of the model changed, every form of row read.

A tiny model that is taught user turns writes its own; fake ones give the counts.
"""

import random
from types import SimpleNamespace

import pytest
import torch
from conftest import moved
from datasets import Dataset
from transformers import GenerationConfig

from bbkit import InputError, config, models, prompts
from bbkit.data import instructions, replies
from bbkit.machine import generation

GENERAL = instructions.examples("train", per_kind=2, kinds=instructions.SEEN)[:12]
ASKED = [prompts.messages(e) for e in GENERAL]
QUIET = {"say": lambda line: None}


@pytest.fixture
def pocket():
    settings = config.load("pocket", None, ["model.lora_rank=4"]).model
    model, _ = models.load(settings, **QUIET)
    return models.add_lora(model, settings, 0)


def test_answers_are_the_base_s_greedy_ones_and_nothing_of_the_model_changes(pocket, tokenizer):
    expected = generation.generate(pocket, tokenizer, GENERAL, 8, 2000)
    moved(pocket, 0.2, seed=1)
    assert generation.generate(pocket, tokenizer, GENERAL, 8, 2000) != expected
    # As a trainer and a model of the Hub leave it.
    inner = pocket.get_base_model()
    own = GenerationConfig(
        do_sample=True, repetition_penalty=5.0, eos_token_id=[1, 2], use_cache=False
    )
    inner.generation_config = pocket.generation_config = own
    pocket.train()
    pocket.gradient_checkpointing_enable()
    pocket.config.use_cache = inner.config.use_cache = False
    frozen = next(m for n, m in pocket.named_modules() if n.endswith("layers.0")).eval()
    modes = [m.training for m in pocket.modules()]
    wanted = [p.requires_grad for p in pocket.parameters()]
    state, ours = torch.get_rng_state(), random.getstate()
    kinds = [e.entity for e in GENERAL]
    found = replies.answered(pocket, tokenizer, ASKED, 8, 2000, kinds)
    assert [r.text for r in found] == expected
    assert [r.kind for r in found] == kinds
    for reply in found:
        ended = reply.reply_ids[-1] == tokenizer.eos_token_id
        assert ended or len(reply.reply_ids) == 8
        assert tokenizer.eos_token_id not in reply.reply_ids[:-1]
        shown = tokenizer(reply.prompt, add_special_tokens=False)["input_ids"]
        assert reply.prompt_ids == shown
    assert any(len(r.reply_ids) == 8 for r in found) and any(len(r.reply_ids) < 8 for r in found)
    assert modes == [m.training for m in pocket.modules()] and not frozen.training
    assert wanted == [p.requires_grad for p in pocket.parameters()]
    assert inner.generation_config is own and pocket.generation_config is own
    assert inner.config.use_cache is False
    assert torch.equal(state, torch.get_rng_state()) and ours == random.getstate()
    # The adapter is on again.
    assert generation.generate(pocket, tokenizer, GENERAL, 8, 2000) != expected


def test_settings_come_back_when_generation_fails(pocket):
    pocket.train()
    own = pocket.generation_config
    with pytest.raises(ZeroDivisionError), generation.undisturbed(pocket):
        assert not pocket.training and pocket.generation_config is not own
        raise ZeroDivisionError
    assert pocket.training and pocket.generation_config is own


def test_padding_and_endings_of_other_tokenizers(pocket, tokenizer, monkeypatch):
    expected = [r.text for r in replies.answered(pocket, tokenizer, ASKED, 12)]
    for pad in (None, tokenizer.eos_token):
        other = models.load(config.load("pocket").model, **QUIET)[1]
        other.pad_token = pad
        assert [r.text for r in replies.answered(pocket, other, ASKED, 12)] == expected
        assert other.pad_token == pad
    # The template closes replies with <|end|> whatever eos is, as in a gguf file.
    other.eos_token = "<|user|>"
    pocket.get_base_model().generation_config = GenerationConfig()
    assert [r.text for r in replies.answered(pocket, other, ASKED, 12)] == expected


def test_special_tokens_are_added_once_and_only_where_the_tokenizer_does(tokenizer):
    from tokenizers.processors import TemplateProcessing

    texts = ["Name a bone.", "<|system|>Name a bone."]
    plain = [r.prompt_ids for r in replies.from_rows(
        tokenizer, [{"prompt": t, "completion": "rib"} for t in texts]).replies]  # fmt: skip
    other = models.load(config.load("pocket").model, **QUIET)[1]
    other.bos_token = "<|system|>"
    bos, eos = other.bos_token_id, other.eos_token_id
    other.backend_tokenizer.post_processor = TemplateProcessing(
        "<|system|> $A <|end|>", special_tokens=[("<|system|>", bos), ("<|end|>", eos)]
    )
    assert other("a")["input_ids"][::2] == [bos, eos]
    other.chat_template = "<|system|>" + other.chat_template
    rows = [{"prompt": t, "completion": "rib"} for t in texts]
    turns = [{"role": "user", "content": "Q"}]
    given = replies.from_rows(other, rows).replies
    assert [r.prompt_ids for r in given] == [[bos, *plain[0]], plain[1]]  # eos at neither's end
    assert [r.reply_ids.count(eos) for r in given] == [1, 1]
    said = [{"role": "assistant", "content": "rib"}]
    [chat] = replies.from_rows(other, [{"prompt": turns, "completion": said}]).replies
    assert chat.prompt_ids.count(bos) == 1 and chat.reply_ids[-1] == eos
    other.chat_template = tokenizer.chat_template  # which writes none, so there is to be none
    [chat] = replies.from_rows(other, [{"prompt": turns, "completion": said}]).replies
    assert bos not in chat.prompt_ids


def test_rows_of_every_form(pocket, tokenizer):
    turns = [{"role": "user", "content": "Name a bone."}]
    said = [{"role": "assistant", "content": "rib"}]
    rows = [{"prompt": turns, "completion": said, "kind": "list", "id": 7}] * 2
    for form in (rows, Dataset.from_list(rows), iter(rows)):
        first, second = replies.from_rows(tokenizer, form).replies
        assert first == second and (first.kind, first.text) == ("list", " rib")
        assert first.prompt == "<|user|>Name a bone.<|end|><|assistant|>"
        assert tokenizer.decode(first.reply_ids) == " rib<|end|>"  # this tokenizer's own space
        assert first.prompt_ids == tokenizer(first.prompt, add_special_tokens=False)["input_ids"]
    for end in ("", "<|end|>"):
        row = {"prompt": "The bone is a", "completion": " rib" + end}
        [reply] = replies.from_rows(tokenizer, [row]).replies
        assert (reply.prompt, reply.text) == ("The bone is a", " rib")
        assert (
            reply.reply_ids[-1] == tokenizer.eos_token_id
            and reply.reply_ids.count(tokenizer.eos_token_id) == 1
        )
    # What a template puts between turns is none of the reply.
    other = models.load(config.load("pocket").model, **QUIET)[1]
    other.chat_template = other.chat_template.replace("'<|end|>'", "'<|end|>\\n'")
    assert replies.from_rows(other, rows[:1]).replies[0].reply_ids == first.reply_ids
    for alone in (["Name a bone.", turns], Dataset.from_list([{"prompt": turns}] * 2)):
        given = replies.from_rows(tokenizer, alone)
        assert not given.replies and given.kinds == ["", ""] and given.prompts[1] == turns
        assert len(replies.answered(pocket, tokenizer, given.prompts, 4, kinds=given.kinds)) == 2
    many = replies.from_rows(
        tokenizer, [{"prompt": str(i), "completion": "y", "kind": "ab"[i > 3]} for i in range(9)], 4
    )
    assert [r.kind for r in many.replies] == many.kinds == ["a", "a", "b", "b"]
    assert [r.prompt for r in many.replies] == many.prompts
    assert replies.from_rows(tokenizer, []) == ([], [], [])


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"text": "x"}, "needs a prompt, with or without a completion, as in TRL: .* 'text' .str"),
        ({"prompt": ""}, "'prompt' .empty str"),
        ({"prompt": []}, "'prompt' .empty list"),
        ({"prompt": [{"role": "user"}]}, "needs a prompt"),
        ({"prompt": "x", "completion": [{"role": "assistant", "content": "y"}]}, "needs a prompt"),
        ({"prompt": [{"role": "user", "content": "x"}], "completion": "y"}, "needs a prompt"),
        ({"prompt": [{"role": "user", "content": "x"}], "completion": []}, "'completion' .empty l"),
        (7, "'row' .int"),
        ({"prompt": "x"}, "no completion, unlike row 1; give all rows one, or none"),
        (
            {
                "prompt": [{"role": "system", "content": "x"}],
                "completion": [{"role": "assistant", "content": "y"}],
            },
            "no chat text of it .Invalid role",
        ),
    ],
)
def test_a_row_of_another_form_is_named(tokenizer, row, says):
    with pytest.raises(InputError, match=f"^replies row 2: .*{says}"):
        replies.from_rows(tokenizer, [{"prompt": "x", "completion": "y"}, row])


def test_shares_are_equal_while_they_last():
    kinds = ["b"] * 50 + ["a"] * 3 + ["c"] * 50
    for count, shares in ((9, (3, 3, 3)), (23, (3, 10, 10)), (24, (3, 11, 10)), (500, (3, 50, 50))):
        places = replies.spread(kinds, count, 0)
        assert places == sorted(set(places)) == replies.spread(kinds, count, 0)
        assert tuple(sum(kinds[i] == k for i in places) for k in "abc") == shares
        assert count == 500 or places != replies.spread(kinds, count, 1)
    assert replies.spread([], 4, 0) == []


def test_prompts_of_a_test_split_are_refused():
    held_out = ["What causes  cholera?"]
    turns = [{"role": "user", "content": "Hi"}, {"role": "user", "content": "what causes CHOLERA?"}]
    replies.refuse_held_out(["What causes measles?", turns[:1]], held_out)
    replies.refuse_held_out([[{"role": "assistant", "content": held_out[0]}]], held_out)
    for prompt in (turns, "What causes cholera? "):
        with pytest.raises(InputError, match=r"prompt 2: .*(cholera|CHOLERA).*leave it out"):
            replies.refuse_held_out(["Fine?", prompt], held_out)


def test_written_replies_are_read_again(tmp_path):
    path = tmp_path / "replies.jsonl"
    assert replies.read(path) == []
    made = [replies.Reply("", "µ\nx", "“y”", [1, 2], [3]), replies.Reply("k", "p", "", [1], [])]
    replies.write(path, made)
    assert replies.read(path) == made and len(path.read_text().splitlines()) == 2
    path.write_text('{"id": 1}\n')
    with pytest.raises(InputError, match=r"replies\.jsonl: not a file of replies"):
        replies.read(path)


def test_a_model_that_was_taught_users_turns_writes_them(writer, tokenizer):
    writer.train()
    lines, state = [], torch.get_rng_state()
    turns = replies.own_turns(writer, tokenizer, 48, 5, 24, batch=20, say=lines.append)
    assert torch.equal(state, torch.get_rng_state()) and writer.training
    texts = [turn["content"] for [turn] in turns]
    assert len(texts) == len({t.lower() for t in texts}) > 15
    sane = [t for t in texts if t.startswith(("Choose from", "Name one of")) and t.endswith(".")]
    assert len(sane) > 0.8 * len(texts) and not any("<|" in t for t in texts)
    assert lines[0].startswith(f"replies: the base wrote {len(turns)} of 48 user turns; ")
    torch.manual_seed(99)
    again = replies.own_turns(writer, tokenizer, 48, 5, 24, batch=20, **QUIET)
    assert again == turns != replies.own_turns(writer, tokenizer, 48, 6, 24, batch=20, **QUIET)
    found = replies.answered(writer, tokenizer, turns, 8)
    assert all(
        r.prompt == f"<|user|>{t}<|end|><|assistant|>" for r, t in zip(found, texts, strict=True)
    )
    kept = replies.own_turns(
        writer, tokenizer, 48, 5, 24, 20, lines.append, held_out=[texts[3].upper()]
    )
    assert kept == turns[:3] + turns[4:] and "stand in a test split" in lines[1]


def fake(tokenizer, said):
    """A model whose `generate` gives these texts behind whatever it is given."""
    model = torch.nn.Linear(1, 1)
    model.device, model.generation_config, left = (
        torch.device("cpu"),
        GenerationConfig(),
        list(said),
    )
    model.asked = []

    def generate(input_ids, pad_token_id, **given):
        model.asked.append((input_ids, given))
        rows = [tokenizer(left.pop(0), add_special_tokens=False)["input_ids"] for _ in input_ids]
        width = max(map(len, rows))
        new = torch.tensor([row + [pad_token_id] * (width - len(row)) for row in rows])
        return torch.cat([input_ids, new], 1)

    model.generate = generate
    return model


def test_turns_that_do_not_end_repeat_or_are_empty_are_dropped_and_counted(tokenizer):
    said = ["Name a rib.<|end|>", "It goes on and", "name  a RIB<|end|>", "<|end|>", " <|end|>"]
    said += ["Two<|end|><|assistant|> x", "Is it the", "No,", "Three<|end|>"]
    lines = []
    model = fake(tokenizer, said)
    # All of a batch as long as the longest: what does not end must not look padded.
    turns = replies.own_turns(model, tokenizer, 9, 0, batch=1, say=lines.append)
    assert [t["content"] for [t] in turns] == ["Name a rib.", "Two", "Three"]
    assert lines == [
        "replies: the base wrote 3 of 9 user turns; 3 did not end, 2 were empty, 1 repeated"
    ]
    assert tokenizer.decode(model.asked[0][0][0]) == "<|user|>"
    told = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    assert told.items() <= model.asked[0][1].items()
    for count, good in ((9, 1), (80, 3)):
        few = fake(tokenizer, [f"Turn {i}<|end|>" for i in range(good)] + ["no"] * (count - good))
        with pytest.raises(InputError, match=rf"{good} of {count} .*give prompts of your own"):
            replies.own_turns(few, tokenizer, count, 0, batch=1)


def test_a_turn_that_ends_in_another_token_has_not_ended(tokenizer):
    model = fake(tokenizer, ["Name a rib.<|system|>", "One<|end|>", "Two<|end|>"])
    model.generation_config.eos_token_id = [1, 2]
    own = model.generation_config
    turns = replies.own_turns(model, tokenizer, 3, 0, **QUIET)
    assert [t["content"] for [t] in turns] == ["One", "Two"] and model.generation_config is own
    assert model.asked[0][1]["eos_token_id"] == [1, 2]


TURN = "{% for m in messages %}<|user|>{{ m.content }}<|end|>{% endfor %}<|assistant|>"


@pytest.mark.parametrize(
    ("template", "opening"),
    [
        (TURN, "<|user|>"),
        (TURN.replace("m.content", "m.content | trim | upper"), "<|user|>"),
        ("<|system|> Be kind.<|end|>" + TURN, "<|system|> Be kind.<|end|><|user|>"),
        (TURN.replace("<|user|>", "<|user|> ").replace("<|end|>", " <|end|>"), "<|user|>"),
        (None, "there is no template"),
        (TURN + "{{ raise_exception('system turn first') }}", "system turn first"),
        (TURN.replace("m.content", "'no'"), "none in what it writes"),
        (TURN.replace("<|user|>", ""), "none in what it writes"),
        (TURN + "{{ messages[0].content }}", "none in what it writes"),
    ],
)
def test_the_opening_of_a_turn_is_found_in_the_template_or_said_not_to_be(template, opening):
    other = models.load(config.load("pocket").model, **QUIET)[1]
    other.chat_template = template
    said = ["One<|end|>", "Two<|end|>"]
    if "<|" in opening:
        model = fake(other, said)
        assert len(replies.own_turns(model, other, 2, 0, **QUIET)) == 2
        assert other.decode(model.asked[0][0][0]) == opening
    else:
        with pytest.raises(InputError, match=rf"^replies: .*\({opening}\); give prompts of your"):
            replies.own_turns(fake(other, said), other, 2, 0)


def test_a_cache_that_cannot_drop_rows_is_made_anew(pocket, tokenizer, monkeypatch):
    expected = [r.text for r in replies.answered(pocket, tokenizer, ASKED, 24)]
    monkeypatch.setattr(generation, "PART", 5)
    whole = pocket.generate

    def generate(**given):
        out = whole(**given)
        out["past_key_values"] = SimpleNamespace()
        return out

    monkeypatch.setattr(pocket, "generate", generate)
    assert [r.text for r in replies.answered(pocket, tokenizer, ASKED, 24)] == expected
