"""Derive the shipped fact table from Disease Ontology releases (CC0).

`python -m bbkit.pocket.facts DOID_FOLDER` reads HumanDO.tsv, disease-symptom.tsv and the two OBO
slims and writes facts.tsv. Definitions are half-formal text ("has_material_basis_in Vibrio
cholerae"), so values are cut at the next clause, spellings of one thing are merged, and what is not
a short clean name is dropped: a lost fact costs a question, a wrong one a wrong gold answer.
"""

import argparse
import csv
import io
import re
from collections import Counter, defaultdict
from pathlib import Path

from bbkit import InputError

_END = (
    r"(?=,|\.|;| and | or | which | that | resulting | in | from | with | has_| has symptom"
    r"| located| results| transmitted| infection\b| \(|$)"
)
_KEYS = {
    "cause": r"(?:has_material_basis_in|caused[ _]by)\s+(?:the |a |an )?",
    "transmission": r"transmitted[ _]by\s+(?:the |a |an )?",
    "symptom": r"has[ _]symptom\s+(?:of )?",
    "site": r"located[ _]in\s+(?:the )?",
}
# The first route of which a keyword occurs; the ontology words the same route in many ways.
_ROUTES = {
    "mosquitoes": "mosquito|culex|aedes", "ticks": "tick", "fleas": "flea", "lice": "louse|lice",
    "sandflies": "sandfl|sand fl", "mites": "mite", "tsetse flies": "tsetse", "midges": "midge",
    "black flies": "black fl", "bats": "bat", "sexual contact": "sexual",
    "respiratory droplets": "droplet", "airborne spores": "airborne",
    "contaminated objects": "fomite", "contaminated needles": "needle",
    "rodents": "rat|mouse|rodent", "animal bites": "bite", "contaminated water": "water",
    "contaminated food": "ingest|food", "raw milk": "milk", "blood": "blood",
    "the mother before birth": "congenital", "inhaled dust": "inhal", "snails": "snail",
    "open wounds": "wound", "direct contact": "contact",
}  # fmt: skip
_ALIKE = {
    "muscle pain": "muscle aches|muscle ache|muscle pains|myalgia", "back pain": "backache",
    "joint pain": "arthralgia|joint pains", "neck stiffness": "stiff neck", "seizure":
    "seizures|convulsions", "skin lesion": "skin lesions|lesions|lesion", "cough": "coughing",
    "poor appetite": "loss of appetite|anorexia", "bleeding": "hemorrhage", "headache": "headaches",
    "swollen lymph nodes": "enlargement of lymph nodes|lymphadenopathy|regional adenopathy",
    "breathlessness": "breathing problems|difficulty breathing|dyspnea|shortness of breath",
    "runny nose": "rhinorrhea", "sore throat": "pharynx inflammation|pharyngitis",
    "abdominal cramp": "abdominal cramps", "eschar": "eschars", "fever":
    "high fever|sudden high fever", "itching": "itch|pruritus", "muscle weakness":
    "muscular weakness", "hepatitis": "liver inflammation", "vision loss": "loss of vision",
    "abscess": "abscesses", "ulcer": "ulcers|skin ulcer", "lung": "lungs", "kidney": "kidneys",
    "nail": "nails", "joint": "joints", "bone": "bones", "eye": "eyes", "lymph node": "lymph nodes",
    "testis": "testes", "sinus": "sinuses", "intestine": "intestines", "muscle": "muscles",
    "leg": "legs",
}  # fmt: skip
_SAME = {other: name for name, others in _ALIKE.items() for other in others.split("|")}
_KINDS = {
    "bacterial infectious disease": "bacterium",
    "viral infectious disease": "virus",
    "fungal infectious disease": "fungus",
    "parasitic protozoa infectious disease": "protozoan",
    "parasitic helminthiasis infectious disease": "worm",
}
_VAGUE = {
    "Bacteria", "Fungi", "Viruses", "Ascomycota fungi", "human body",
    "Microsporidia phylum members", "foot along", "brain of horses", "swelling symptom",
    "inflammation", "pain", "acute pain", "lesion",
}  # fmt: skip


def derive(folder: Path) -> list[tuple[str, str, str, str]]:
    """Rows (DOID, subject, relation, object) of the fact table, sorted.

    Raises `InputError` when a file is missing.
    """
    parents: dict[str, list[str]] = defaultdict(list)
    for row in _table(folder, "HumanDO.tsv"):
        parents[row["label"]].append(row["subClassOf"])
    clean = {
        key: {relation: _values(relation, values) for relation, values in own.items()}
        for key, own in sorted(_said(folder).items()) if _is_name(key[1])
    }  # fmt: skip
    counts = Counter((r, o) for own in clean.values() for r, os in own.items() for o in os)
    rows = set()
    kinds: dict[str, set[str]] = defaultdict(set)
    doid_of: dict[str, str] = {}
    for (doid, label), own in clean.items():
        for relation, values in own.items():
            # A symptom or site that one disease alone has cannot be a sibling's distractor.
            often = [v for v in values if relation == "cause" or counts[relation, v] >= 3]
            for value in often[:4]:
                rows.add((doid, label, relation, value))
                if relation == "cause":
                    kinds[value].add(_kind(label, parents))
                    doid_of.setdefault(value, doid)
    for agent, found_kinds in kinds.items():
        if len(found_kinds) == 1 and "" not in found_kinds:
            rows.add((doid_of[agent], agent, "kind", found_kinds.pop()))
    return sorted(rows)


def _text(folder: Path, name: str) -> str:
    if not (folder / name).is_file():
        raise InputError(
            f"{folder / name} is missing: name a folder with the Disease Ontology files"
        )
    return (folder / name).read_text(encoding="utf-8")


def _table(folder: Path, name: str) -> csv.DictReader:
    return csv.DictReader(io.StringIO(_text(folder, name)), delimiter="\t")


def _said(folder: Path) -> dict[tuple[str, str], dict[str, list[str]]]:
    """(DOID, disease) -> relation -> values, as definitions and the table of symptoms have them."""
    said: dict[tuple[str, str], dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for slim in ("infectious_disease", "rare"):
        known = set(said)
        for term in _text(folder, f"DO_{slim}_slim.obo").split("[Term]")[1:]:
            head = re.search(r"^id: (\S+)\nname: (.*)", term, re.M)
            text = re.search(r'^def: "(.*?)" \[', term, re.M)
            if not head or not text or "is_obsolete: true" in term or head.groups() in known:
                continue
            for relation, pattern in _KEYS.items():
                # Causes of others are genes and inheritance: another world, and another tokeniser.
                if relation != "cause" or slim == "infectious_disease":
                    found = re.finditer(pattern + "(.+?)" + _END, text[1])
                    said[head[1], head[2]][relation] += [m[1] for m in found]
    for row in _table(folder, "disease-symptom.tsv"):
        said[row["disease_id"], row["disease_label"]]["symptom"].append(row["symptom_label"])
    return said


def _is_name(text: str) -> bool:
    return bool(re.fullmatch(r"[A-Za-z][A-Za-z0-9' \-]{2,38}", text)) and len(text.split()) <= 4


def _values(relation: str, values: list[str]) -> list[str]:
    out: dict[str, None] = {}
    for value in values:
        value, folded = value.strip(), value.strip().casefold()
        if relation == "transmission":
            hits = (r for r, words in _ROUTES.items() if re.search(rf"\b(?:{words})", folded))
            value = next(hits, "")
        elif relation == "cause":
            value = re.sub(r" (species|bacteria|bacterial|fungal|molds)$", "", value)
            value = re.sub(r"^(parasite|acquisition of) ", "", value)
            if not value[:1].isupper() and not value.endswith("virus"):
                continue
            value = value[:1].upper() + value[1:]
        else:
            value = _SAME.get(folded, folded)
        if _is_name(value) and value not in _VAGUE:
            out[value] = None
    return list(out)


def _kind(label: str, parents: dict[str, list[str]]) -> str:
    """The kind of organism, from the nearest ancestor that names one; '' when there is none."""
    queue, seen = [label], set()
    while queue:
        node = queue.pop(0)
        if node in _KINDS:
            return _KINDS[node]
        if node not in seen:
            seen.add(node)
            queue += parents.get(node, [])
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description="Derive facts.tsv from the Disease Ontology.")
    parser.add_argument("folder", type=Path, help="folder with the Disease Ontology files")
    rows = derive(parser.parse_args().folder)
    target = Path(__file__).with_name("facts.tsv")
    lines = ["doid\tsubject\trelation\tobject"] + ["\t".join(row) for row in rows]
    target.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{len(rows)} facts of {len({r[0] for r in rows})} diseases in {target.name}")


if __name__ == "__main__":
    main()
