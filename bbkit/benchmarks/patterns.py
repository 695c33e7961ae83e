"""What `bbkit.benchmarks.extraction` looks for: names that no option is, and how letters are said.

Serves the accuracy claims, as extraction does. Patterns with {} take the letters that may be said;
each alternative is there for replies in which it was met, which tests/benchmarks/test_extraction.py
keeps. Repeats have bounds: a reply of any length is read in linear time.
"""

import re

# After a genus: "C. difficile" is no option C. By the letter of the genus: "B. Fetus" may be B.
EPITHETS = (
    "A actinomycetemcomitans aegypti albopictus baumannii braziliense calcoaceticus caninum "
    "cantonensis castellanii caviae duodenale felis flavus fumigatus hydrophila israelii "
    "lumbricoides naeslundii nidulans niger phagocytophilum simplex terreus veronii xylosoxidans "
    "B abortus afzelii anthracis bacilliformis bronchiseptica burgdorferi canis cepacia cereus "
    "coli dermatitidis divergens fragilis garinii glabrata henselae hermsii hominis licheniformis "
    "longum malayi mallei melitensis microti miyamotoi ovis parapertussis pertussis pseudomallei "
    "quintana recurrentis subtilis suis thetaiotaomicron timori tropicalis C abortus acnes "
    "albicans auris botulinum burnetii canimorsus cayetanensis coli diff difficile diphtheriae "
    "dubliniensis elegans felis fetus freundii gattii glabrata guilliermondii hafniensis hominis "
    "immitis jeikeium jejuni koseri krusei lusitaniae minutissimum neoformans novyi parapsilosis "
    "parvum pecorum perfringens philippinensis pneumoniae posadasii psittaci septicum sinensis "
    "sordellii sporogenes striatum tertium tetani trachomatis tropicalis ulcerans upsaliensis "
    "violaceum D andersoni caninum dendriticum folliculorum fragilis hominis immitis latum "
    "medinensis melanogaster nodosus pteronyssinus repens variabilis E aerogenes canis "
    "chaffeensis cloacae coli corrodens dermatitidis dispar ewingii faecalis faecium floccosum "
    "granulosus histolytica multilocularis rhusiopathiae vermicularis F buski hepatica magna "
    "nucleatum tularensis G duodenalis intestinalis lamblia vaginalis H alvei capitis capsulatum "
    "diminuta ducreyi haemolyticus influenzae nana parainfluenzae pylori I belli pacificus "
    "ricinus scapularis"
)
GAP = r"[\s*_`\"'“”‘’${<]{0,12}"
# Words that may follow a bare letter: no noun of which the letter would be a part (B cells).
AFTER = (
    "because since as due based given which here therefore thus per according rather instead not"
).split()
IS = (
    r"(?:\s{1,4}(?:(?:here|(?:to|for)\s(?:this|the|your)\squestion)\s)?"
    r"(?:is|would\sbe|should\sbe|must\sbe|will\sbe|was|(?:appears|seems)\sto\sbe)\b|\s{0,4}[:=])"
)
KIND = r"(?:answer|option|choice|letter|response)"
SURE = (
    r"(?:(?:(?:most\s)?likely(?:\sto\sbe)?|probably|clearly|certainly|definitely|thus|therefore|"
    r"indeed|simply):?\s{1,4}[*_`\"'“‘]{0,3})?"
)
NAMED = rf"(?:(?:the\s)?{KIND}\s{{1,4}}(?!is\b)|{KIND}:\s{{0,4}})?"
FOREIGN = (  # the word for "answer"; no \b in what is written without spaces
    r"(?:答案|回答|答え|正解|正确的?选项|정답|"
    r"(?i:\b(?:respuesta|réponse|antwort|risposta|resposta|opción|alternativa|antwoord|svar|"
    r"ответ|cevap|jawaban|odpowiedź)(?:\s(?:corr\w{1,7}|final\w?|yang\sbenar))?))\s{0,4}"
    r"(?:(?:[是为為は은는]|(?:es|est|is|ist|è|é|lautet|adalah)\b"
    r"(?:\s(?:la|el|die|le|a(?=\salt))\b)?)\s{0,2}[:=]?|[:=—])"
    r"(?:\s{0,2}(?i:opción|alternativa|letra|opção|réponse|option)\s)?|"
    r"(?<!不)(?<!可)选(?:择)?(?!项)"
)
SENTENCE = re.compile(
    r"(?i:(?<![a-z])(?:answer(?:s|\(s\))?|choice|option|response|ans|(?:my|best)\sguess|exception|"
    r"(?:right|correct)\sone|(?:true|false|(?:in)?correct)\sstatement)\.?"
    rf"(?:[\s_]{{1,4}}(?:{KIND}|left))?{GAP}{IS}){GAP}:?{GAP}"
    rf"(?i:{SURE}{NAMED}(?:not\s[(\[]?[A-Z][)\]]?,?\sbut\s(?:rather\s)?)?)"
)
SHORT = re.compile(  # no dash of a list below
    r"(?:\b[Aa]ns\b[.)]?(?=[ *_])|(?i:\b(?:answer|choice|option|ans)\b)\.?[ *_]{0,6}[-–—]{1,2}|"
    rf"\n[#*_ ]{{1,8}}(?i:(?:(?:final|correct|best)\s)?answer)[*_ ]{{0,4}}(?=\n)|{FOREIGN}){GAP}"
)
# A small letter is one only where its word ends: "is a virus", "is a\nvirus" have an article.
SMALL = (
    r"(?!(?<=a)[ ]{0,4}\n\s{0,3}(?!because|since)[a-z])[*_`\"'”’]{0,3}"
    r"(?:[.)]?[*_ ]{0,4}(?:$|\n)|[.)]\s|,?\s(?:because|since)\b)"
)
CHOSEN = re.compile(
    r"(?i:\b(?:i['’]m\sgoing\swith|let['’]s\sgo\swith|(?:i|i['’]d|i['’]ll|we)\s(?:would\s|will\s)?"
    r"(?:choose|select|pick|answer|say|recommend|go\swith))\s{1,4}(?:it(?:['’]s|\sis)\s)?"
    rf"(?:the\s)?{KIND}?){GAP}"
)
# "The answer is Brucella (option A)", "option A, a worm, is correct", "A is correct."; {} are the
# letters. Without "option" only at the start of a sentence: "hepatitis B is the best answer".
BEHIND = (
    r"(?i:\b(?:answer|choice)\s{{1,4}}is\s)([^.;\n()]{{1,120}})"
    r"(?:\(|,\s(?:which\sis\s|i\.e\.,?\s)?|\s[-–—]\s)"
    r"(?i:answer|option|choice|letter)\s{{1,4}}\(?([{}])\)?(?=[).;,\s]{{0,3}}(?:$|\n|[A-Z]))"
)
BEST = r"\s{{1,3}}(?:is|(?:appears|seems)\sto\sbe)\s(?:the\s|my\s(?:final\s)?)?(?:only\s)?"
NOUN = (
    r"\s(?:answer|option|choice|fit|one|diagnosis|cause|explanation|"
    r"(?:next\s)?step(?:\sin\s(?:the\s)?management)?)(?:\shere)?"
)
BUT = r",(?!\s(?:but|however|although|though|only|if|when|yet)\b)"
RIGHT = (
    r"(?i:\b(?:option|choice|answer)\s{{1,3}}[*_]{{0,3}}[(\[]?([{}])[)\]]?[*_]{{0,3}}"
    rf"(?:,[^,.;\n]{{{{1,80}}}},|\s?\([^()\n]{{{{1,80}}}}\))?{BEST}"
    r"(?:answer|correct|right|best|most\s(?:likely|appropriate))(?:"
    rf"\s(?:answer|option|choice)\sfor\b|(?:{NOUN})?\s?"
    rf"(?:[.;:!]|{BUT}|$|\n|and\b|as\s(?!a\b)|because|since|given)))"
)
BARE = (
    r"(?m:(?:^|[.:;!]\s{{1,3}}|\b(?i:thus|therefore|hence|so|conclusion),?\s|\b(?i:only)\s|"
    r"\w\s(?=\()))[*_]{{0,3}}[(\[]?"
    rf"([{{}}])[)\]]?[*_]{{{{0,3}}}}{BEST}(?:answer|(?:correct|right|best)(?:{NOUN})?|"
    rf"most\s(?:likely|appropriate)(?:{NOUN})?)\s?(?:[.;!]|{BUT}|$|\n|because|since)"
)
# "So it must be B": only as a reply's last words, and not where a blood group was spoken of.
IT = (
    r"(?:(?:^|[.!?\n]\s{{0,3}})(?i:(?:so|thus|therefore|hence),?\s|i\s(?:think|believe)\s)?"
    r"(?i:(?:it|that)(?:['’]s|\s(?:is|must\sbe|has\sto\sbe))\s(?:(?:option|choice)\s)?)|"
    r"[.!?,\n]\s{{0,3}}(?i:so|thus|therefore|hence)[,:]?\s|\b(?i:left\swith\s)|"
    r"[.!?\n]\s{{0,3}}(?i:(?:answer\s)?(?:choose|choice|option)\s)|"
    r"(?:→|=>)\s?[*_]{{0,3}}(?i:(?:option|choice)\s)?|"
    r"\b(?i:(?:corresponds\sto|matches|which\sis|left\sis)\s(?:answer\s)?(?:option|choice)\s))"
    r"[*_(\[]{{0,3}}([{}])[)\]*_.!]{{0,5}}$"
)
LETTERED = r"(?i:antigen|blood|class|factor|grade|group|hepatitis|influenza|stage|type|vitamin)"
MARKED = r"(?:[*_]{0,3}[.):\]]|\s{1,2}[-–—]\s)"  # behind the letter of a label
LAST = re.compile(
    r"(?i:(?:thus|therefore|hence|so)[,:]?\s|(?:=>|→)\s?|"
    r"(?:conclusion|correct|final|result|solution|verdict):\s|"
    r"(?:choose|go\swith|pick|select)\s)?(?i:(?:answer|option|choice)\.?\s)?[*_]{0,3}"
)
UNSURE = re.compile(
    r"(?i:\b(?:if|whether|unless|suppose|assum\w{1,6}|neither|rather\sthan|instead\sof|except|"
    r"(?:first|initially)\s(?:thought|believed)|at\sfirst(?:\sglance)?,?\s(?=the\s)|"
    r"(?:students?|student's|people|many)(?=\s(?:$|[^.;:,\n]{0,30}\b(?:think|say|said|choose)))|"
    r"tempting|(?:some|one|you)\s(?:might|may|could|would)|"
    r"(?:wrong|incorrect|mistaken?)\s(?:to|that)|"
    r"(?:not|never|cannot|n't|n’t)\s(?:think|believe|say|clear|certain|sure|conclude|mean|that|the))"
    r"\b)[^.;:,\n]*$|n['’]t\s(?:think|believe|say|conclude|mean)\b[^.;:,\n]*$"
)
# "If he were stable, the answer would be A."
SUPPOSED = re.compile(
    r"(?:^|[.!?;\n]\s{0,3})(?:(?:But|And)\s)?(?i:if|were|had|in\s(?:an?|another))\s[^.!?;\n]*$"
)
# "each option: A. ...", "the drug of choice is: A) ...": a list or a thing begins, no answer.
OF_MANY = re.compile(
    r"(?i:\b(?:all|any|both|each|every|following|other|another|one|distractor|first|"
    r"second(?:[\s-]best)?|worst|previous|initial|your|eliminated|excluded|rejected|tempting|of|"
    r"immune|inflammatory|"
    r"(?:wrong|incorrect)(?=\s(?:answer\s)?$))\s(?:answer\s)?$)"
)
TAKEN_BACK = re.compile(
    r"[^.\n]{0,12}\b(?:no,?\swait|wait|sorry)\b"
    r"|[\s.…,;:*)!-]{0,8}(?i:(?:wait|actually|correction|scratch\sthat|i\smean|on\sreflection)\b)"
    r"|,?\s(?:maybe|perhaps|possibly|but\s(?:it\s)?(?:could|may|might)\s(?:also\s)?be)\b"
    r"|,?\s{1,3}(?:which|but)\b[^.\n]{0,20}(?:wrong|incorrect|\balso\b)"
)
ALSO = r"\b[{}][)\]]?\s(?:is|would\sbe|could\sbe|may\sbe)\s(?:also|equally)\s(?:correct|right)\b"
REFUSED = re.compile(
    r"(?i:\b(?:is|are|was|(?:would|can)\sbe)\s(?:also\s)?(?:incorrect|wrong|unlikely|false|"
    r"contraindicated|inappropriate|excluded|ruled\sout|less\slikely|"
    r"not\s(?:the|correct|right|likely|an?\s(?:answer|option|choice)|supported|indicated|"
    r"appropriate|recommended|safe|used))\b|"
    r"\b(?:isn|doesn|wouldn)['’]t\b|\b(?:does|would)\snot\b)"
)
DISMISSED = re.compile(  # behind a label: "A) No.", "A) Aspirin - incorrect"
    r"[\s*_]*(?i:incorrect|wrong|false|no|not)\b"
    r"|[^.;,\n]*(?:[-–—:(]\s?(?i:incorrect|wrong|not?|contraindicated)\b|[❌✗✘])"
)
# The last line's "The best next step is **C. CT angiography**", "Thus, it is most likely option C".
WEIGHED = re.compile(
    r"(?i:\b(?:most|best|correct|next|greatest|least|false|except|therefore|thus|hence|based)\b)"
)
DOUBTED = re.compile(
    r"(?i:n['’]t\b|\b(?:if|either|not|also|may|might|could|second|wrong|tempting)\b)"
)
FIRM = (
    r"(?i:\b(?:is|are|be|was)\s(?:(?:most\s)?likely\s|probably\s)?(?:to\sbe\s)?)[*_]{{0,3}}"
    r"(?:(?i:(?:the\s)?(?:option|choice|answer)\s)[*_]{{0,3}}|(?=[(]?[{}][.):]))"
)
# Before a last line that is none: "vitamin\nD.", "38.5 degrees\nC", "the options are:\nA) flu".
BROKEN = re.compile(rf"{LETTERED}\s?:?$|(?:\d|°|degrees|(?::|\bis)\s[A-Z])$")
LISTS = re.compile(r"(?i:\b(?:options|choices|possibilities|each|one\sby\sone)\b)")
ASIDE = r"\((?i:option|choice|answer)\s([{}])\)[*_.!\s]{{0,4}}$"  # "… is heparin (option C)."
LEAD = r"^(?i:(?:the\s)?(?:(?:correct|best|final)\s)?(?:answer|option|choice)\b(?:\sis)?:?\s{0,4})"
PLAIN = re.compile(  # marks
    r"\\[()]|\\(?=[.\[\]])|</?(?i:b|i|em|strong|p|final_?answer)>|</?A(?i:nswer)>|"
    r"\$?\\(?:text|math)[a-z]{0,4}\{(?=[^{}]{1,9}\})|[✅✔👉\ufe0f\u200b\ufeff]"
)
AFTERWARDS = re.compile(  # what a model runs on with
    r"<\|endoftext\|>|</s>|<eos>|\n[#*_ ]{0,6}(?i:question|exercise)(?:\s\d{1,3})?[*_]{0,3}:"
)
TOKENS = re.compile(r"<\|[^|<>\s]+\|>|</?(?:s|[be]os|pad|\w+_of_turn)>|\[/?INST\]")
STOPS = str.maketrans({"。": ". ", "、": ", "} | dict.fromkeys("«»「」【】", '"'))
# Full width, circled, bold; a whole text's NFKC takes its length squared where marks pile up.
FORMS = re.compile("[\u2460-\u24ff\u3000\uff01-\uff5e\U0001d400-\U0001d7ff]")
FIELD = (
    r'"((?:final_|correct_)?(?i:answer|choice|option)(?:_choice|_letter|_option)?)"'
    r'\s{0,8}:\s{0,8}(?:\[\s{0,4}"([^"\n]{0,400})"\s{0,4}\]|"([^"\n]{0,400})"|([A-Z])\b)'
)
PUNCTUATION = " ()[].:*\"'“”"
