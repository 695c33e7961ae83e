"""The letter that a model commits to in free-form benchmark output, by one documented rule.

Serves the accuracy claims on MedQA and BIOMED-MMLU, where published scorers read "vitamin D" as D.
The strongest kind of statement that is there decides, alone: 1. the kit's answer tag, 2. a JSON
field, 3. a boxed letter, 4. a sentence such as "the answer is (C)", 5. a line that is a label. Two
letters of that kind, a hedge or a denial give None: never a guess, and never a weaker kind.
"""

import re
from collections.abc import Iterator
from unicodedata import normalize

from bbkit import prompts

# After a genus: "C. difficile" is no option C. By the letter of the genus: "B. Fetus" may be B.
EPITHETS = (
    "A actinomycetemcomitans aegypti baumannii braziliense caninum cantonensis duodenale felis "
    "flavus fumigatus hydrophila israelii lumbricoides niger phagocytophilum terreus B abortus "
    "anthracis bacilliformis bronchiseptica burgdorferi canis cepacia cereus coli dermatitidis "
    "fragilis glabrata henselae hermsii hominis malayi mallei melitensis microti parapertussis "
    "pertussis pseudomallei quintana recurrentis subtilis suis tropicalis C abortus acnes albicans "
    "auris botulinum burnetii coli diff difficile diphtheriae elegans felis fetus freundii gattii "
    "glabrata hafniensis hominis immitis jejuni koseri krusei lusitaniae minutissimum neoformans "
    "novyi parapsilosis parvum perfringens pneumoniae psittaci septicum sinensis sordellii tetani "
    "trachomatis tropicalis ulcerans upsaliensis D caninum folliculorum fragilis hominis immitis "
    "latum medinensis melanogaster E aerogenes canis cloacae coli corrodens dermatitidis faecalis "
    "faecium granulosus histolytica multilocularis rhusiopathiae vermicularis"
)
GAP = r"[\s*_`\"'“”‘’$]{0,12}"
# Words that may follow a bare letter: no noun of which the letter would be a part (B cells).
AFTER = "because since as due based given which here therefore thus per according".split()
IS = (
    r"(?:\s{1,4}(?:(?:here|to\s(?:this|the)\squestion)\s)?"
    r"(?:is|would\sbe|should\sbe|must\sbe|will\sbe|was|(?:appears|seems)\sto\sbe)\b|\s{0,4}[:=])"
)
KIND = r"(?:answer|option|choice|letter|response)"
SURE = r"(?:(?:most\slikely|likely|probably|clearly|thus|therefore|indeed|simply)\s{1,4})?"
NAMED = rf"(?:(?:the\s)?{KIND}\s{{1,4}}(?!is\b)|{KIND}:\s{{0,4}})?"
FOREIGN = (  # the word for "answer"; no \b in what is written without spaces
    r"(?:答案|回答|答え|正解|정답|(?i:\b(?:respuesta|réponse|antwort|risposta|resposta|antwoord|svar|"
    r"ответ|cevap|jawaban|odpowiedź)(?:\s(?:corr\w{1,7}|final\w?))?))\s{0,4}(?:[:=]|[是为為は])"
)
SENTENCE = re.compile(
    rf"(?i:\b(?:answer|choice|option|response|ans)\.?(?:\s{{1,4}}{KIND})?{GAP}{IS}){GAP}:?{GAP}"
    rf"(?i:{SURE}{NAMED})"
)
SHORT = re.compile(  # no dash of a list below
    r"(?:\b[Aa]ns\b[.)]?(?=[ *_])|(?i:\b(?:answer|choice|option|ans)\b)\.?[ *_]{0,6}[-–—]{1,2}|"
    rf"{FOREIGN}){GAP}"
)
# A small letter is one only where its word ends: "is a virus", "is a\nvirus" have an article.
SMALL = (
    r"(?!(?<=a)[ ]{0,4}\n\s{0,3}(?!because|since)[a-z])[*_`\"'”’]{0,3}"
    r"(?:[.)]?[*_ ]{0,4}(?:$|\n)|[.)]\s|,?\s(?:because|since)\b)"
)
CHOSEN = re.compile(
    r"(?i:\b(?:i|i'd|i'll|we)\s(?:would\s|will\s)?(?:choose|select|pick|go\swith)\s{1,4}"
    rf"(?:the\s)?{KIND}?){GAP}"
)
# "The answer is Brucella (option A)", "option A, a worm, is correct", "A is correct."; {} are the
# letters. Without "option" only at the start of a sentence: "hepatitis B is the best answer".
BEHIND = (
    r"(?i:\b(?:answer|choice)\s{{1,4}}is\s)([^.;\n()]{{1,120}})"
    r"\((?i:answer|option|choice|letter)\s{{1,4}}([{}])\)"
)
RIGHT = (
    r"(?i:\b(?:option|choice|answer))\s{{1,3}}[*_]{{0,3}}[(\[]?([{}])[)\]]?[*_]{{0,3}}"
    r"(?:,[^,.;\n]{{1,80}},|\s?\([^()\n]{{1,80}}\))?\s{{1,3}}is\s(?:the\s)?"
    r"(?:(?:correct|right|best)\b(?!\s(?:in|about|that|to|for))|most\s(?:likely|appropriate)"
    r"(?:\s(?:answer|option|choice|diagnosis|cause|explanation))?\s?(?:[.,!]|$|\n|because|since))"
)
BARE = (
    r"(?m:(?:^|[.:;!]\s{{1,3}}|\b(?i:thus|therefore|hence|so),?\s))[*_]{{0,3}}[(\[]?([{}])[)\]]?"
    r"[*_]{{0,3}}\sis\s(?:the\sanswer|(?:the\s)?(?:correct|right|best)"
    r"(?:\s(?:answer|option|choice))?)\s?"
    r"(?:[.,;!]|$|\n|because|since)"
)
# "So it must be B": only as a reply's last words, and not where a blood group was spoken of.
IT = (
    r"(?:^|[.!?\n]\s{{0,3}})(?i:(?:so|thus|therefore|hence),?\s)?"
    r"(?i:it(?:['’]s|\s(?:is|must\sbe|has\sto\sbe))\s)[*_(\[]{{0,3}}([{}])[)\]*_.!]{{0,5}}$"
)
LETTERED = r"(?i:antigen|blood|class|factor|grade|group|hepatitis|influenza|stage|type|vitamin)"
MARKED = r"(?:[*_]{0,3}[.):\]]|\s{1,2}[-–—]\s)"  # behind the letter of a label
LAST = re.compile(r"(?i:(?:thus|therefore|hence|so),?\s)?(?i:(?:option|choice)\s)?[*_]{0,3}")
UNSURE = re.compile(
    r"(?i:\b(?:if|whether|unless|suppose|assum\w{1,6}|neither|rather\sthan|instead\sof|except|"
    r"students?|student's|people|many|tempting|(?:some|one)\s(?:might|may|could|would)|"
    r"(?:wrong|incorrect|mistaken?)\s(?:to|that)|"
    r"(?:not|never|cannot|n't|n’t)\s(?:think|believe|say|clear|certain|sure|conclude|mean|that|the))"
    r"\b)[^.;:,\n]*$|n['’]t\s(?:think|believe|say|conclude|mean)\b[^.;:,\n]*$"
)
# "each option: A. ...", "the drug of choice is: A) ...": a list or a thing begins, no answer.
OF_MANY = re.compile(
    r"(?i:\b(?:all|any|both|each|every|following|other|another|of|immune|inflammatory)\s"
    r"(?:answer\s)?$)"
)
TAKEN_BACK = re.compile(
    r"[^.\n]{0,12}\b(?:no,?\swait|wait|sorry)\b"
    r"|,?\s{1,3}(?:which|but)\b[^.\n]{0,20}(?:wrong|incorrect|\balso\b)"
)
REFUSED = re.compile(
    r"(?i:\b(?:is|are|was|would\sbe)\s(?:also\s)?(?:incorrect|wrong|unlikely|false|"
    r"not\s(?:the|correct|right|likely|an?\s(?:answer|option|choice)|supported|indicated))\b)"
)


def extract_choice(text: str, letters: str = "ABCD") -> str | None:
    """The one letter of `letters` that `text` commits to, or None; see the module for the rule.

    >>> extract_choice("Vitamin D is out. The answer is (C)."), extract_choice("It is vitamin D.")
    ('C', None)
    >>> extract_choice('{"step_by_step_thinking": "...", "answer_choice": "B"}')
    'B'
    >>> extract_choice("The answer is A or B."), extract_choice("The answer is C. difficile.")
    (None, None)
    """
    text = FORMS.sub(lambda m: normalize("NFKC", m[0]), text.rpartition("</think>")[2])
    text = PLAIN.sub("", TOKENS.sub("\n", text.translate(STOPS))).strip()
    for kind in (_tag, _json, _boxed, _sentences, _lines):
        found = set(kind(text, letters))
        if found:
            return found.pop() if len(found) == 1 else None
    return None


LEAD = r"^(?i:(?:the\s)?(?:answer|option|choice)\b(?:\sis)?:?\s{0,4})"
PLAIN = re.compile(r"\\[()]|\\(?=[.\[\]])|</?(?i:b|i|em|strong)>")  # marks around a letter
TOKENS = re.compile(r"<\|[^|<>\s]+\|>|</?(?:s|[be]os|pad|\w+_of_turn)>|\[/?INST\]")
STOPS = str.maketrans({"。": ". ", "、": ", "})
# Full width, circled, bold; a whole text's NFKC takes its length squared where marks pile up.
FORMS = re.compile("[\u2460-\u24ff\u3000\uff01-\uff5e\U0001d400-\U0001d7ff]")
FIELD = (
    r'"(?:final_|correct_)?(?i:answer|choice|option)(?:_choice|_letter|_option)?"\s{0,8}:\s{0,8}'
    r'(?:"([^"\n]{0,400})"|([A-Z])\b)'
)


def _tag(text: str, letters: str) -> Iterator[str | None]:
    if "<answer>" in text:
        given = (prompts.split_reply(text) or (None, None))[1]
        yield _whole(given or "", letters)


def _json(text: str, letters: str) -> Iterator[str | None]:
    for quoted, bare in re.findall(FIELD, text):
        yield _whole(quoted or bare, letters)


def _boxed(text: str, letters: str) -> Iterator[str | None]:
    shape = r"\\boxed\s{0,4}\{((?:[^{}]|\{[^{}]{0,200}\}){0,200})\}"
    for match in re.finditer(shape, text):
        if not REFUSED.match(text[match.end() : match.end() + 40].lstrip(" $")):
            inner = re.sub(r"\\(?:text|mathrm|mathbf|textbf)\b|[{}]", "", match[1])
            yield _whole(inner, letters)


def _whole(given: str, letters: str) -> str | None:
    """Of a field that is a letter or begins with a label: "C", "(c)", "C. text", "option C"."""
    given = re.sub(LEAD, "", given.strip()).strip(" *_`'\"$")
    bare = given.strip(" ()[].:")
    if len(bare) == 1 and bare.upper() in letters:
        return bare.upper()
    return _label(given, 0, letters)


def _label(text: str, at: int, letters: str) -> str | None:
    """The letter that stands at `at` as a label of its own and not as part of a name."""
    small = f"[{letters.lower()}]"
    shape = rf"([(\[]?)([{letters}]|(?<=[(\[]){small}|{small}(?={SMALL}))([)\]]?)"
    match = re.compile(shape).match(text, at)
    if not match or (bool(match[1]) != bool(match[3]) and match[1]):
        return None
    rest = re.sub(r"^[*_`\"'”’$}]{1,6}", "", text[match.end() : match.end() + 80])
    link = r"\.?\s{0,3}(?:,\s{0,3}(?:and|or|then)?|[/&+;]|\(?(?:and|or)\b|as\swell\sas\b)\s{0,3}"
    apart = r"\b(?!['’]|\s(?:is|was|are|would|can|does|fails)\b)"
    other = rf"[(\[]?(?:[{letters}]{apart}|{small}(?:[)\].,;]|\s{{0,3}}(?:$|\n|and\b|or\b)))"
    if re.match(rf"{link}(?i:{KIND}\s)?{other}", rest):
        return None
    if rest.lstrip().startswith("?") or TAKEN_BACK.match(rest):
        return None
    letter = match[2].upper()
    if match[3]:
        return letter
    word = re.match(r"\.\s{0,3}([A-Za-z]+)", rest)
    if word and re.search(rf"{letter}[a-z ]* {word[1].casefold()}\b", EPITHETS):
        return None
    ended = r"(?:[,;:)\]]|\.(?:(?!\w)|(?=[A-Z][a-z]{2}))|[.]?\s{0,3}(?:$|\n)|\s{1,3}[-–—(:])"
    if re.match(ended, rest) or not rest.strip():
        return letter
    word = re.match(r"\s{1,3}([a-z]+)\b", rest)
    return letter if word and word[1] in AFTER else None


def _sentences(text: str, letters: str) -> Iterator[str | None]:
    hedge = re.compile(rf"[(\[]?[{letters}][)\]]?\s{{0,3}}(?:,|/|&|\+|\(?(?:and|or)\b|as\swell)")
    for pattern in (SENTENCE, SHORT, CHOSEN):
        for match in pattern.finditer(text):
            letter = _label(text, match.end(), letters)
            behind = text[match.end() : match.end() + 600]
            listed = letter == letters[0] and _listed(behind, letters)
            if listed or OF_MANY.search(text[max(0, match.start() - 30) : match.start()]):
                continue
            if (letter or hedge.match(text, match.end())) and not _denied(text, match):
                yield letter
    for match in re.finditer(BEHIND.format(letters), text):
        if not _denied(text, match) and not re.search(r"\b(?:not|neither)\b|n['’]t", match[1]):
            yield match[2]
    for shape in (RIGHT, BARE, IT):
        for match in re.finditer(shape.format(letters), text):
            before = text[max(0, match.start() - 200) : match.start()] if shape is IT else ""
            if not _denied(text, match) and not re.search(LETTERED, before):
                yield match[1]


def _listed(text: str, letters: str) -> bool:
    """Whether a text that begins with the first option goes on with the second: no answer."""
    lines = _bare(text)
    second = re.match(rf"[(\[]?{letters[1]}{MARKED}", "".join(lines[1:2]))
    return bool(second) and not REFUSED.search(lines[1][:300])


def _bare(text: str) -> list[str]:
    return [bare for line in text.splitlines() if (bare := line.strip(" *_`>#-\t"))]


def _denied(text: str, match: re.Match) -> bool:
    return UNSURE.search(text[max(0, match.start() - 60) : match.start()]) is not None


def _lines(text: str, letters: str) -> Iterator[str | None]:
    text = text.upper() if len(text.strip(" *_`")) == 1 else text  # "b", and nothing else
    lines = _bare(text)
    if not lines:
        return
    labelled = [_line(line, letters) for line in lines]
    if len({x for x in labelled if x}) > 1:
        yield None
    elif labelled[0] or labelled[-1]:
        yield labelled[0] or labelled[-1]


def _line(line: str, letters: str) -> str | None:
    """The letter of a line that is a label, or a label and an option's text, not refused."""
    line = line[LAST.match(line).end() :]  # type: ignore[union-attr]
    bare = line.strip(" ()[].:*")
    if len(bare) == 1 and (bare in letters or (bare.upper() in letters and line != bare)):
        return bare.upper()
    # "A: text" may be an answer to "Q:".
    labelled = re.match(rf"[(\[]?[{letters}]{MARKED}", line)
    if not labelled or line.startswith("A:") or REFUSED.search(line[:300]):
        return None
    return _label(line, 0, letters)
