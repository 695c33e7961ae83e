"""The letter that a reply commits to: plain forms, traps without any letter, speed."""

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bbkit.evaluate import extract_choice

SAID = [
    "C", "(C)", "c)", "C.", "**C**", "C. Generation of free radicals", "(C) Generation",
    "C) disclose the error", "The answer is C", "The answer is C.", "the answer is (C)",
    "The answer is (c).", "The correct answer is: C", "The correct answer is option C.",
    "The best answer is **C**.", "**Answer:** C", "Answer: (C) Generation of free radicals",
    "ANSWER: C", "Final answer: C", "Final Answer:\n\nC", "My answer is C, since B is wrong.",
    "The answer is C because the nerve is cut.", "The answer is C - Generation",
    "Therefore, the answer is most likely C.", "Thus the correct option is C: aspirin.",
    "The correct choice is C.", "The answer choice is C. Start heparin.", "I would choose C.",
    "I choose (C).", "Option C is correct.", "Option (C) is the best answer.",
    "Choice C is the most appropriate.", r"So \boxed{C}.", r"\boxed{\text{(C)}}",
    r"$\boxed{\mathrm{C}}$", r"\boxed{C. heparin}", '{"answer_choice": "C"}', '{"answer": "C"}',
    '{"step_by_step_thinking": "A and B fail", "answer_choice": "C. Generation"}',
    '{"answer_choice": "(C)"}', '{"answer_choice": "option C"}', '{"answer_choice": C}',
    "<reasoning>The answer is B?</reasoning><answer>C</answer>", "<answer>(c)</answer>",
    "<answer>C) virus</answer>", "<answer>C. virus</answer> The answer is D.",
    "The answer is Brucella (option C).", "If it were viral, A would do. The answer is C.",
    "It is not clear at first, but the answer is C.", "A 35-year-old man has gout.\nAnswer: C",
    "Vitamin D is low and hepatitis B is out. The answer is (C).", "Reasons follow.\n\nC",
    "The answer is C. C. difficile is treated so.", "Answer: C\nA is wrong. B is wrong.",
    "C is correct.", "**C** is the correct answer.", "Thus, C is the best answer.", "Option C",
    "**Option C**", "Option C: heparin", "Option **C** is correct.", "Hence, option C.",
    "**Option C** is the correct answer.", "Option C, heparin, is the correct answer.",
    "The correct response is C.", "The answer here is C.", "The answer to this question is C.",
    "The correct answer appears to be C.", "C.Heparin", "C - Heparin", "**C**: Heparin",
    r"The answer is \(C\).", "Ans: C", "Answer：C", "<b>C</b>", "answer: c",
    "The answer is C, A is wrong.", "Since it is not viral the answer is C.",
    '{"correct_answer": "C"}', '{"choice": "C"}', "Answer: **C) text**", "So the answer is: C",
    "<think>Perhaps the answer is B.</think> The answer is C.", "The correct answer is **C. text**",
    "The answer is C. Again: the answer is C.", "the answer would be C", "The answer should be C.",
    "answer is c.", "the answer is c. It is viral.", "the answer is c, because A is viral",
    "the answer is **c**", "the answer is c) virus", "I choose c.", "<answer>c) virus</answer>",
    "the answer is (c), a bacterium", "c", "`c`", "Answer - C", "**Answer** – C. virus",
    "Answer--C", "answer: c\nheparin", "Ans. C", "**Ans.** C", "Ans. c. virus", "Ans) c",
    "Ans. The answer is C", "Answer: The answer is C", "So it must be C", "It's C.",
    "A and B are viral, D is none. Therefore, it is C.", "The final answer is C</s>",
    "C<|eot_id|>", "<|im_start|>assistant\nC<|im_end|>", "The answer is C<end_of_turn>\n",
    "C<｜end▁of▁sentence｜>", "The answer is C<|eot_id|>assistant\n\nThe answer is C<|eot_id|>",
    "答案：C", "正确答案是C。因为", "答案：（C）", "정답: C", "答え：C", "Antwort: C",
    "Respuesta correcta: C", "Réponse : C", "ответ: C", "Ｃ", "（Ｃ）", "Ⓒ", "𝐂",
    "Ａｎｓｗｅｒ：Ｃ",
    '{"step_by_step_thinking": "the answer is A. x", "answer_choice": "C. Latum"}',
    "Let's evaluate each option:\n\nA. Aspirin: no.\n\nB. Heparin: no.\n\nThe answer is (C).",
    "C is the answer.", "Option C (Warfarin) is correct.", "```\nC\n```", "---\n**C) virus**\n---",
    "The answer is C\\. virus", "Option C is the most likely diagnosis.",
    "The options are:\nA) flu\nB) gout\n\nThe answer is:\nC) virus\n\nA) is incorrect.",
    # what the last line finds, and an option beside which others are refused
    "Let's evaluate each option:\n\nA. Aspirin: no.\n\nThe most likely diagnosis is C. Warfarin.",
    "The most likely diagnosis is **C. Sarcoidosis**.", "Thus, the best next step is option C.",
    "C) Heparin. A is incorrect.", "C. Heparin. The other options are incorrect.",
    "C\n\nExplanation:\nA. Aspirin: antiplatelet.\nB. Warfarin: teratogenic.",
    "Option C, movement of the lid, is the correct answer as it keeps food out.", "Option c",
    "option c is correct", "(c) heparin", "I'm going with C.", "So the answer is definitely C.",
    "The answer is C rather than D.", "In conclusion, C is correct.", "answer_choice: C",
    "<answer>The correct answer is C.</answer>", '{"answer": ["C"]}', r"\boxed{\mathsf{C}}",
    "The answer is C!", '"C"', "The answer is \u200bC.", "\ufeffC", "正确答案是：C",
    "La respuesta correcta es C.", "Die Antwort lautet C.", "La réponse est C.",
    "The wrong answer is B. The correct answer is C.", "Your answer: A\nCorrect answer: C",
    "The previous answer was A. The answer is C.", "<reasoning>The answer is A?</reasoning>\n\nC",
    "<thinking>The answer is A.</thinking>\nThe answer is C.",
    "People with gout should avoid it so the answer is C.",
    # marks, "not A but C", quotes as MedMCQA's writers have them, a conclusion, other languages
    "The correct answer is therefore **C**.", "The answer is most likely **C**.",
    "The answer is not B but rather (C).", "Ans. is 'c' i.e., Stone", "Answer is \"c\", a worm",
    "C, because the enzyme is missing.", "**C** because of gout", "I think it's C.",
    "I'd say it's C", "I would answer C.", "I recommend C.", "The answer to your question is (C).",
    "C is the most appropriate option.", "C is the only correct option.", "C is my final answer.",
    "Option C appears to be the correct answer.", "Only C is correct.", "Heparin (C) is correct.",
    "Option C is the most appropriate next step in management.", "The exception is C.",
    "The incorrect statement is C.", "The answer is heparin, which is option C.",
    "This corresponds to answer choice (C).", "That's option C.", "A is viral, B is viral. So C.",
    "Option A is the most appropriate for stable patients. This one is not, so (C).",
    "Conclusion: **C**", "Final: C", "Answer (C)", "Choose C.", "=> C", "✅ **C. Heparin**",
    "I first thought the answer was A, but the answer is C.", "The answer is C and not B.",
    "You might think the answer is A. The correct answer is C.", "The answer is C…", "c) heparin",
    "At first glance, the answer appears to be A. The answer is C.", "<Answer>C</Answer>",
    "The answer is: C\n\nD: incorrect", "A: no.\nB: no.\nC: yes.\n\n### Answer\n**C**\n\nDone.",
    "<answer>\\boxed{C}</answer>", r"The answer is $\text{C}$.", "The answer is {C}.",
    '[{"option": "A", "why": "no"}, {"option": "B", "why": "no"}], "answer": "C"',
    # what a model runs on with, an option named last, what is only supposed
    "C. Gout\n\nQuestion: A man has pain.\nA. x\nB. y\nAnswer: B",
    "Answer: C<|endoftext|>Answer: B",
    "Let me see.\n\nQuestion: A man has pain.\nA. x\nB. y\nC. z\nAnswer: C", "Gout → **Option C**",
    "The best next step would be CT (Option C).", "It lasts. Answer choice C.",
    "So we are left with C.",
    "Option C is the best choice here.",
    "If he were stable, the answer would be A. The answer is C.",
    "My best guess is C.", "The right one is C.", "The false statement is C.", "Verdict: C",
    "The only option left is C.", "The answer is heparin - option C.", "This matches option C.",
    "Result: C", "Solution: C", "Pick C.", "Go with C.", "Select C.", "Let's go with C.",
    "Het juiste antwoord is C.", "Jawaban yang benar adalah C.", "La opción correcta es C",
    "The answer for this question is C.", "The answer is «C».", "The answer is <C>.",
    "The answer is heparin, i.e. option C.", "A. Incorrect - option A fails. That's C.",
    "本题选C", "因此选择C。", "正确选项是C", "正解はCです。", "정답은 C입니다.",
    "Правильный ответ — C.",
    "La respuesta correcta es la opción C.", "A resposta correta é a alternativa C.",
]  # fmt: skip
THINGS = [
    "vitamin {}", "hepatitis {}", "group {} streptococcus", "{} cells", "influenza {} virus",
    "protein {}", "factor {} deficiency", "type {} personality", "Table {}", "point {}",
    "immunoglobulin {}", "blood group {}", "apolipoprotein {}", "cyclin {}", "{} fibres",
]  # fmt: skip
FRAMES = [
    "It is {}.", "The answer is {}.", "The most likely diagnosis is {}", "{} explains it.",
    "<answer>{}</answer>", '{{"answer_choice": "{}"}}', "Answer: {}", r"\boxed{{{}}}",
]  # fmt: skip
TRAPS = [
    "", "   ", "None of the above.", "I do not know.", "A patient with gout needs rest.",
    "A 40-year-old man", "The answer is A virus.", "The answer is a virus.", "A virus causes it.",
    "Options A and B are wrong.", "Options A and B are wrong, D too.", "A and B are both right.",
    "The answer is A or B.", "The answer is either A or B.", "The answer is A and C.",
    "The answer is A/B.", "Answer: A, B", "The answer is A. The answer is B.",
    "Answer: A\nAnswer: B", '{"answer_choice": "A/B"}', '{"answer_choice": "A and B"}',
    '{"answer_choice": "None of the above"}', '{"answer_choice": ""}', '{"answer_choice": "E"}',
    '{"answer_choice": "A"} {"answer_choice": "B"}', "<answer>A</answer><answer>B</answer>",
    "<answer>A or B</answer>", "<answer></answer>", "<answer>A", r"\boxed{A} or \boxed{B}",
    r"\boxed{42}", "The answer is not B.", "The answer is not (B).", "If the answer is B, stop.",
    "I don't think the answer is B.", "Is the answer B?", "It is wrong to say the answer is B.",
    "Whether the answer is B is unclear.", "The answer is C. difficile.", "Answer: B. cereus",
    "The answer is A. fumigatus.", "Answer: D. latum", "Answer: C-reactive protein",
    "The answer is D-dimer.", "Answer: B12", "The answer is C3.", "The answer is A1c.",
    "Option B is incorrect.", "Option B is not correct.", "Option B is wrong.",
    "A. is wrong because of x.\nB. is wrong because of y.", "A) virus\nB) worm\nC) fungus",
    "Neither A nor B.", "All of A, B, C and D.", "Grade B evidence.", "Stage C disease",
    "The answer is B cells.", "The answer is E.", "Answer: X", "The answer is hepatitis (B).",
    "The answer is not Brucella (option A).", "The answer is B?", "Plan B. Plan A failed.",
    "Vitamin D.", "hepatitis B", "Hepatitis\nB virus", "Child-Pugh class B", "Klasse B",
    "La respuesta no es B.", "答案", "D2 receptors", "The answer is B's sister.",
    "B) is incorrect.", "B. Metformin is incorrect because", "(B) is not the answer.",
    r"\\boxed{B} is wrong", "Q: cause?\nA: Brucella", "Let me think.\nA) Aspirin is wrong.",
    "Many students think the answer is A.", "It is tempting to say that the answer is A here.",
    "The student's answer is B, which is incorrect.", "Option B is the most likely to be wrong",
    "The best answer is B for children, C for adults.", "The answer is A (or B).",
    "The answer is A as well as B.", "Answer: A, then B", "The answer is B -- no wait, C.",
    "Answer: C. diff", "Answer: C. Difficile", "The answer is C. tropicalis.",
    "The answer is A. hydrophila.", "Hepatitis B is the best answer.",
    "The answer is A & D.", "Answer: A+B", "the answer is b cells",
    # a small letter: the article, abbreviations, organisms, two of them
    "answer is a virus", "the answer is a\nvirus that", "answer: a\nvirus",
    "the answer is a.k.a. flu", "the answer is b.i.d. dosing", "the answer is c. difficile",
    "the answer is c-reactive protein",
    "the answer is c/o pain", "the answer is a (rare) virus", "the answer is a - rare - virus",
    "the answer is not c.", "the answer is c?", "the answer is a or b.", "the answer is a, b",
    "the answer is a. or b.", "the answer is a) or b)", "The answer is (a) or (b)",
    "<answer>b cells</answer>", "a virus", "d dimer", "a b", "vitamin d",
    "Answer - A virus", "Answer - B cells", "Answer - C-section", "Answer - B12", "Answer - A or B",
    "Answer - not B", "Option - D. latum", "Immune response - B, T and NK cells",
    "Pick the best option\n- A. Aspirin\n- B. Heparin", "Ans. to B12", "Ans. A virus",
    "Ans. B cells", "Ans. C. difficile", "It acts on the ANS. B cells do not.", "The ANS. B.",
    "It must be B cells", "so it must be A-positive", "So it must be B lymphocytes.",
    "So it must be B or C.", "If so it must be B", "It must be a.", "It is C. difficile.",
    "Her blood group is not A. So it must be B.", "It is viral hepatitis, not A.\nIt is B.",
    "Which influenza? It's A.", "答案：C反应蛋白", "正解はC反応性蛋白", "Ｂ細胞",
    "the answer is d/t trauma",
    "So it must be B. No, it cannot be.", "It is hepatitis B</s>", "vitamin D<|im_end|>",
    "<s>A virus</s>", "<|im_start|>assistant\nA virus<|im_end|>", "The answer is A<|x|> or B",
    "答案：C型肝炎", "答案：维生素D", "答案：A或B", "答案：A、B", "答案：A\n答案：B",
    "Antwort: B-Zellen", "Respuesta: a veces", "Respuesta inmune: B y T", "Réponse: D'abord",
    "答案：В", "Ｂ型肝炎", "Vitamin Ｄ", "Ａ ｖｉｒｕｓ", "Ａ, Ｂ",
    '{"answer_choice": "C. difficile"}', '{"answer_choice": "B. cereus"}',
    '{"answer_choice": "D. latum"}',
    # a list begins, or a thing
    "Let's analyze each option:\n\nA) Aspirin: it is\nB) Heparin: but\nC) Warf",
    "Choose the correct option:\nA) Aspirin\nB) Heparin\nC) Warfarin",
    "The drug of choice is: A) vancomycin", "The immune response is: A) humoral",
    "Option A is the most likely cause of pneumonia in hospitals, but this one has (B).",
    "Option A is the most appropriate for stable patients. This one is not.",
    "The answer is C;D", "The answer is C, but D is also correct.",
    "Let's go through the options one by one.\n\nA. Aspirin is an agent that", "Options:\nA) flu",
    "A. Aspirin B. Heparin C. Warfarin D. tPA", "Is it A. Aspirin, B. Heparin, or C. Warfarin?",
    "Option A: Aspirin - an antiplatelet.\nOption B: Heparin - an anticoagulant.",
    # refused, taken back, more than one
    "A) Aspirin - Incorrect.", "A) No.", "A. Wrong", "A) Aspirin isn't correct.", "A) Aspirin ❌",
    "A) Warfarin is contraindicated here.\n\nThe drug that should be used is heparin.",
    "Option A is correct but not the best next step. The best next step is surgery.",
    "Option A is the most appropriate, but she is allergic, so she needs azithromycin.",
    "Option A is correct if the patient is pregnant. She is not.", "Option A is best avoided here.",
    "Option A is right ventricular infarction, with ST elevation.", "The wrong answer is B.",
    "Option B is the right atrium.", "Option A is correct and option B is correct.",
    "The incorrect answer is: B", "The second best answer is B.", "Eliminated option: A",
    "The answer is C. Wait, actually D.", "The answer is C. Correction: D.",
    "The answer is B, I mean C.", "The answer is C. D is also correct.",
    "The answer is C, maybe D.", "The answer is probably C, but could be D.", "Answer: (A)(B)",
    "Answer: A) Heparin, C) Warfarin", "The answer is B... or C", "<answer>A) x, B) y</answer>",
    '{"answer": ["A", "B"]}',
    "The most tempting wrong choice is D.", "It is most likely not C. Heparin",
    "Student answer: B.", "The best drug may also be C. Heparin",
    "Her blood group is most likely B. Rest is best.",
    # a line or a reply that was broken off
    "This is due to deficiency of vitamin\nD.", "Vaccinate against hepatitis\nB.",
    "Blood type:\nA", "His temperature is 38.5 degrees\nC.", "<think>\nThe answer is B. But wait",
    "A. calcoaceticus is the most likely cause.", "Answer: C. canimorsus",
    # near to forms that are read
    "The answer is not A but B cells.", "The answer is not A, but it could be B or C.",
    "The answer is therefore **B** cells", "The answer is 'a' or 'b'.", "The answer is 'B cells'.",
    "I'd say A virus.", "I would answer A and B.", "I wouldn't pick C.", "I think it's B cells.",
    "I think it's hepatitis B.", "I initially thought the answer is B.", "Final: hepatitis B",
    "Conclusion: A patient needs rest.", "Correct: A and B", "Solution: D. latum",
    "Vitamin D is the most likely answer.", "C is the most likely cause of pneumonia.",
    "A because it is viral. B because it is bacterial.", "A, because x\nB, because y",
    "The correct answer is: A\n\nB: the drug. C: the other", "The answer is {A} or {B}.",
    "A. Warfarin - contraindicated in pregnancy.\n\nSo we use heparin.", "不选A", "选A或B",
    "If he were stable, the answer would be A. But he is not.",
    "Were he stable, the answer would be A.",
    "In a stable patient, the answer would be A. This one is not.", "选项A：阿司匹林",
    "正解はC反応性蛋白です", "Her blood group is A. So B",
]  # fmt: skip
NAMED = list(zip(FRAMES, "ABCDABCD", strict=True))
TRAPS += [frame.format(thing.format(letter)) for thing in THINGS for frame, letter in NAMED]


@pytest.mark.parametrize("reply", SAID)
def test_a_committed_letter_is_read(reply):
    assert extract_choice(reply) == "C"


def test_there_are_two_hundred_traps():
    assert len(set(TRAPS)) >= 190 and len(set(TRAPS)) + len(SAID) >= 250


@pytest.mark.parametrize("reply", sorted(set(TRAPS)))
def test_no_letter_is_read_where_none_is_committed_to(reply):
    assert extract_choice(reply) is None


def test_an_epithet_is_one_after_its_genus_alone():
    reply = '{"step_by_step_thinking": "the answer is C. no", "answer_choice": "B. Fetus"}'
    assert extract_choice(reply) == "B"
    assert extract_choice("The answer is A. Coli") == "A"
    assert extract_choice("The answer is C. fetus") is None


def test_other_letters_can_be_asked_for():
    assert extract_choice("The answer is (E).", "ABCDE") == "E"
    assert extract_choice("The answer is E. coli.", "ABCDE") is None
    assert extract_choice("Answer: J", "ABCDEFGHIJ") == "J"
    assert extract_choice("The answer is H. pylori.", "ABCDEFGHIJ") is None
    assert extract_choice("The answer is A.\nB", "A") == "A"


@given(st.text(alphabet="ABCD abcd()[]{}.,:;*\"'\\n\n<>/answerboxisxtheoption", max_size=200))
def test_whatever_comes_is_a_letter_or_none(text):
    assert extract_choice(text) in {None, "A", "B", "C", "D"}


@pytest.mark.parametrize(
    "unit",
    [
        "the answer is ", "\\boxed{", '"answer_choice":  ', "A", "( ", "<answer>", "option A is ",
        " ", "\n", "the answer is x (option ", '"answer": "', "answer:" + " " * 12,
        "answer is a. ", "Ans. ", "answer - ", "so it must be B.", "<|", "<a", "答案", "Ｂ",
        "\u0316\u0300", "a\n",
    ],
)  # fmt: skip
def test_a_megabyte_is_read_in_linear_time(unit):
    seconds = []
    for size in (100_000, 1_000_000):
        text = unit * (size // len(unit))
        began = time.process_time()
        extract_choice(text)
        seconds.append(time.process_time() - began)
    assert seconds[1] < 40 * max(seconds[0], 0.01), seconds


def test_an_explanation_that_names_an_option_names_the_right_one(data_dir):
    """MedMCQA's, as their writers left them: "Ans. b. Brisk jaw jerk", "Answer- A (Cricoid …)"."""
    lines = (data_dir / "medmcqa" / "dev.head100.json").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    found = [(extract_choice(row["exp"] or ""), "ABCD"[row["cop"] - 1]) for row in rows]
    read = [(ours, gold) for ours, gold in found if ours]
    assert len(read) >= 30 and all(ours == gold for ours, gold in read)


@pytest.mark.parametrize("name", ["medqa", "mmlu"])
def test_chain_of_thought_replies_are_read_as_recorded_or_not_at_all(name, data_dir):
    """GPT-3.5's replies: the record falls back on the first letter, or A, where none is given."""
    path = data_dir / "answers" / f"{name}__cot__gpt-35-turbo-16k.jsonl"
    if not path.exists():
        pytest.skip(f"no {path}: github.com/Teddy-XiongGZ/MIRAGE's predictions, scorer's letters")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    ours = [extract_choice(row["response"]) for row in rows]
    read = [(o, r) for o, r in zip(ours, rows, strict=True) if o is not None]
    assert all(o == r["reference_extracted"] for o, r in read)
    assert len(read) / len(rows) > 0.96
    for letter, row in zip(ours, rows, strict=True):
        if letter is None:
            assert row["reference_extracted"] in "ABCD"  # a guess

    def accuracy(found):
        return sum(f == r["gold"] for f, r in zip(found, rows, strict=True)) / len(rows)

    guessed = [letter or "A" for letter in ours]
    recorded = accuracy([row["reference_extracted"] for row in rows])
    assert abs(accuracy(guessed) - recorded) < 0.005
    assert accuracy(ours) <= recorded  # what is not said counts as wrong
