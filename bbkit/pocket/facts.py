"""Derive the shipped fact table from Disease Ontology releases (CC0).

`python -m bbkit.pocket.facts DOID_FOLDER` reads HumanDO.tsv, disease-symptom.tsv and the two OBO
slims and writes facts.tsv. Definitions are half-formal text ("has_material_basis_in Vibrio
cholerae"), so values are cut at the next clause, spellings of one thing are merged, and what is not
a short clean name is dropped: a lost fact costs a question, a wrong one a wrong gold answer.
"""

import argparse
import csv
import re
from collections import Counter, defaultdict
from pathlib import Path

from bbkit.errors import InputError

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
# First keyword that occurs names the route; the ontology words the same route in many ways.
_ROUTES = {
    "mosquito": "mosquitoes", "culex": "mosquitoes", "aedes": "mosquitoes", "tick": "ticks",
    "flea": "fleas", "louse": "lice", "lice": "lice", "sandfl": "sandflies", "sand fl": "sandflies",
    "mite": "mites", "tsetse": "tsetse flies", "midge": "midges", "black fl": "black flies",
    "bat": "bats", "sexual": "sexual contact", "droplet": "respiratory droplets",
    "airborne": "airborne spores", "fomite": "contaminated objects",
    "needle": "contaminated needles",
    "rat": "rodents", "mouse": "rodents", "rodent": "rodents", "bite": "animal bites",
    "water": "contaminated water", "ingest": "contaminated food", "food": "contaminated food",
    "milk": "raw milk", "blood": "blood", "congenital": "the mother before birth",
    "inhal": "inhaled dust", "snail": "snails", "wound": "open wounds", "contact": "direct contact",
}  # fmt: skip
_SAME = {
    "muscle aches": "muscle pain", "muscle ache": "muscle pain", "muscle pains": "muscle pain",
    "myalgia": "muscle pain", "arthralgia": "joint pain", "joint pains": "joint pain",
    "stiff neck": "neck stiffness", "backache": "back pain", "skin lesions": "skin lesion",
    "lesions": "skin lesion", "lesion": "skin lesion", "loss of appetite": "poor appetite",
    "anorexia": "poor appetite", "enlargement of lymph nodes": "swollen lymph nodes",
    "lymphadenopathy": "swollen lymph nodes", "regional adenopathy": "swollen lymph nodes",
    "breathing problems": "breathlessness", "difficulty breathing": "breathlessness",
    "dyspnea": "breathlessness", "shortness of breath": "breathlessness", "seizures": "seizure",
    "convulsions": "seizure", "hemorrhage": "bleeding",
    "coughing": "cough", "rhinorrhea": "runny nose",
    "pharynx inflammation": "sore throat", "pharyngitis": "sore throat",
    "headaches": "headache", "abdominal cramps": "abdominal cramp", "eschars": "eschar",
    "high fever": "fever", "sudden high fever": "fever", "itch": "itching", "pruritus": "itching",
    "muscular weakness": "muscle weakness", "liver inflammation": "hepatitis", "loss of vision":
    "vision loss", "abscesses": "abscess", "ulcers": "ulcer", "skin ulcer": "ulcer",
    "lungs": "lung", "kidneys": "kidney", "nails": "nail", "joints": "joint", "bones": "bone",
    "eyes": "eye", "lymph nodes": "lymph node", "testes": "testis", "sinuses": "sinus",
    "intestines": "intestine", "muscles": "muscle", "legs": "leg",
}  # fmt: skip
_KINDS = {
    "bacterial infectious disease": "bacterium",
    "viral infectious disease": "virus",
    "fungal infectious disease": "fungus",
    "parasitic protozoa infectious disease": "protozoan",
    "parasitic helminthiasis infectious disease": "worm",
}
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9' \-]{2,38}")
_VAGUE = {
    "Bacteria", "Fungi", "Viruses", "Ascomycota fungi", "human body",
    "Microsporidia phylum members",
    "foot along", "brain of horses", "swelling symptom", "inflammation", "pain",
    "acute pain", "lesion",
}  # fmt: skip


def derive(folder: Path) -> list[tuple[str, str, str, str]]:
    """Rows (DOID, subject, relation, object) of the fact table, sorted.

    Raises `InputError` when a file is missing.
    """
    for name in (
        "HumanDO.tsv",
        "disease-symptom.tsv",
        "DO_infectious_disease_slim.obo",
        "DO_rare_slim.obo",
    ):
        if not (folder / name).is_file():
            raise InputError(
                f"{folder / name} is missing: name a folder with the Disease Ontology files"
            )
    parents: dict[str, list[str]] = defaultdict(list)
    with open(folder / "HumanDO.tsv", encoding="utf-8") as handle:
        for row in csv.DictReader(handle, delimiter="\t"):
            parents[row["label"]].append(row["subClassOf"])
    raw: dict[tuple[str, str], dict[str, list[str]]] = {}
    infectious = set()
    for name in ("DO_infectious_disease_slim.obo", "DO_rare_slim.obo"):
        for term in (folder / name).read_text(encoding="utf-8").split("[Term]")[1:]:
            head = re.search(r"^id: (\S+)\nname: (.*)", term, re.M)
            text = re.search(r'^def: "(.*?)" \[', term, re.M)
            if not head or not text or "is_obsolete: true" in term:
                continue
            key = (head.group(1), head.group(2))
            if "infectious" in name:
                infectious.add(key)
            elif key in infectious:
                continue
            found = raw.setdefault(key, defaultdict(list))
            for relation, pattern in _KEYS.items():
                found[relation] += [
                    m.group(1) for m in re.finditer(pattern + "(.+?)" + _END, text.group(1))
                ]
    with open(folder / "disease-symptom.tsv", encoding="utf-8") as handle:
        for row in csv.DictReader(handle, delimiter="\t"):
            key = (row["disease_id"], row["disease_label"])
            raw.setdefault(key, defaultdict(list))["symptom"].append(row["symptom_label"])

    clean: dict[tuple[str, str], dict[str, list[str]]] = {}
    for key, found in sorted(raw.items()):
        if not _NAME.fullmatch(key[1]) or len(key[1].split()) > 4:
            continue
        own = {r: _values(r, values) for r, values in found.items()}
        if key not in infectious:
            own["cause"] = []  # genes and inheritance: another world, and another tokeniser
        clean[key] = own
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


def _values(relation: str, values: list[str]) -> list[str]:
    out = []
    for value in values:
        value = value.strip()
        if relation == "transmission":
            folded = value.casefold()
            value = next((r for word, r in _ROUTES.items() if re.search(rf"\b{word}", folded)), "")
        elif relation == "cause":
            value = re.sub(r" (species|bacteria|bacterial|fungal|molds)$", "", value)
            value = re.sub(r"^(parasite|acquisition of) ", "", value)
            if not value[:1].isupper() and not value.endswith("virus"):
                continue
            value = value[:1].upper() + value[1:]
        else:
            value = _SAME.get(value.casefold(), value.casefold())
        if (
            _NAME.fullmatch(value)
            and len(value.split()) <= 4
            and value not in _VAGUE
            and value not in out
        ):
            out.append(value)
    return out


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
