"""The vocabulary of the exact checks: spelling, stop words, plurals, and the names of organs and findings.

Decisions:
- American spelling is the common form; rules work on lower-case text, by word part where Greek digraphs
  make them safe.
- ``NAMES`` maps adjectives and near-synonyms to one name ("renal" -> "kidney"). It is not a terminology: a
  word it does not know is simply no name, and the similarity alone judges it.
- Plurals need only be *consistent* (both texts go through the same rules), not linguistically right.
"""

from __future__ import annotations

import re
from functools import lru_cache

from clinkd.data.boxes import from_qwen


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


_PARTS = {
    "oedem": "edem", "haem": "hem", "tumour": "tumor", "oesoph": "esoph", "caec": "cec", "faec": "fec",
    "foet": "fet", "paed": "ped", "gynaec": "gynec", "noea": "nea", "rrhoea": "rrhea", "coelia": "celia",
    "naev": "nev",
    "anaesth": "anesth", "aetiolog": "etiolog", "oestr": "estr", "sulph": "sulf", "leucocy": "leukocy",
    "dilatation": "dilation", "aneurism": "aneurysm", "fibre": "fiber", "calibre": "caliber",
    "litre": "liter", "colour": "color", "neighbour": "neighbor", "behaviour": "behavior",
}  # fmt: skip
_PATTERNS = (
    (re.compile(r"aem(?=ia|ic)"), "em"),  # anaemia, ischaemic
    (re.compile(r"\bcentre(s?)\b"), r"center\1"),
    (re.compile(r"(\b|milli|centi)metre"), r"\1meter"),
    (re.compile(r"\bgrey"), "gray"),
    (re.compile(r"\bdisk(s?)\b"), r"disc\1"),
    (re.compile(r"\bx[ -]rays?\b|\bxrays?\b"), "xray"),
    (re.compile(r"\b(\w*(?:al|er|or|an|im|on|gn|bil))is(e|ed|es|ing|ations?)\b"), r"\1iz\2"),
    (re.compile(r"\b(\w*)(ana|cata|para)lys(e|ed|es|ing)\b"), r"\1\2lyz\3"),
    (re.compile(r"\b(label|model|travel|channel|signal)l(ed|ing)\b"), r"\1\2"),
)
_PART = re.compile("|".join(_PARTS))

STOP = _set(
    """a an the this that these those it its there here of in on at to by for from with within into near
    next along and or nor is are was were be been being am has have had do does did can could may
    might shall should will would as than then so such also just only very both which who whose what
    where when while whereas but however although though i we you they he she seen see noted note
    identified identify visible visualized observed detected found present shown show shows showing
    displays display displayed demonstrated demonstrates depicts depicted contains contain containing
    located lies lie lying situated positioned placed appears appear appeared seems seem suggests
    suggest indicates indicate represents corresponds evident apparent called named known consists
    includes including remains s"""
)
# Beyond stop words, what a sentence about an image may add without saying anything.
FILLER = _set("""image picture region area structure object part anatomical answer box bounding marked""")
VERBS = _set(
    """is are was were be been has have had do does did can could may might will would shows show showing
    displays demonstrates depicts contains appears appear seems remains lies suggests indicates"""
)
PREPOSITIONS = _set(
    """of in on at within near from with by for to into along above below beside behind between"""
)
PLACES = _set("side sided part half aspect portion corner quadrant hand")
LEVELS = _set(
    """upper lower mid middle superior inferior anterior posterior medial lateral proximal distal"""
)
_COUNTED = "two three four five six seven eight nine ten eleven twelve"
NUMBERS = {word: value for value, word in enumerate(_COUNTED.split(), start=2)} | {"one": 1, "single": 1}
UNITS = {"mm": 1.0, "millimeter": 1.0, "cm": 10.0, "centimeter": 10.0}  # in millimetres

_IRREGULAR = {
    "vertebrae": "vertebra", "metastases": "metastasis", "diverticula": "diverticulum",
    "bronchi": "bronchus", "nuclei": "nucleus", "stenoses": "stenosis", "thromboses": "thrombosis",
    "emboli": "embolus", "nevi": "nevus", "ova": "ovum", "septa": "septum", "hila": "hilum",
    "atria": "atrium", "humeri": "humerus", "feet": "foot", "calculi": "calculus",
    "thrombi": "thrombus", "femora": "femur", "scapulae": "scapula", "foci": "focus",
}  # fmt: skip

_NAMES = """
kidney: renal nephric
liver: hepatic
lung: pulmonary
heart: cardiac myocardial myocardium
spleen: splenic
pancreas: pancreatic
stomach: gastric
brain: cerebral cerebrum
bladder: vesical
gallbladder:
aorta: aortic
vertebra: vertebral
spine: spinal
sacrum: sacral
rib: costal
hip: acetabulum
femur: femoral thighbone
humerus: humeral
tibia: tibial shinbone
fibula: fibular
pelvis: pelvic
scapula: scapular
clavicle: clavicular collarbone
sternum: sternal breastbone
mandible: mandibular
skull: cranial cranium
prostate: prostatic
uterus: uterine
ovary: ovarian
testis: testicle testicular
breast: mammary
thyroid:
thymus: thymic
adrenal:
esophagus: esophageal
trachea: tracheal windpipe
bronchus: bronchial
colon: colonic
rectum: rectal
duodenum: duodenal
intestine: intestinal bowel
appendix: appendiceal
cecum: cecal
diaphragm: diaphragmatic
ventricle: ventricular
atrium: atrial
hippocampus: hippocampal
cerebellum: cerebellar
thalamus: thalamic
eye: ocular
retina: retinal
macula: macular
cornea: corneal
lens:
knee:
shoulder:
elbow:
wrist:
ankle:
muscle: muscular
skin: cutaneous
larynx: laryngeal
pharynx: pharyngeal
tumor: neoplasm neoplastic
mass:
nodule: nodular
cyst: cystic
polyp: polypoid
hemorrhage: hemorrhagic bleeding bleed
hematoma:
edema: edematous
fibrosis: fibrotic
stone: calculus
fracture: fractured
effusion:
pneumothorax:
pneumonia:
consolidation: consolidated
atelectasis: atelectatic
emphysema: emphysematous
abscess:
infarct: infarction infarcted
aneurysm: aneurysmal
metastasis: metastatic
melanoma:
nevus:
keratosis:
carcinoma:
ulcer: ulceration ulcerated
hernia: herniation
embolus: embolism
thrombus: thrombosis
cardiomegaly:
"""
NAMES = {
    variant: name
    for name, others in (line.split(":") for line in _NAMES.strip().splitlines())
    for variant in (name, *others.split())
}

MODALITY_WORDS = {
    "ct": "ct", "mr": "mr", "mri": "mr", "xray": "x", "radiograph": "x",
    "pet": "pet", "ultrasound": "ultrasound", "ultrasonography": "ultrasound", "sonogram": "ultrasound",
    "endoscopic": "endoscopy", "endoscopy": "endoscopy",
    "dermoscopic": "dermoscopy", "dermoscopy": "dermoscopy", "fundus": "fundus",
}  # fmt: skip

_SPECIAL = re.compile(r"<\|[^|<>]*\|>")
_TAGS = re.compile(r"<box>.*?</box>|</?(?:box|ref|quad)>", re.S)
_TOKEN = re.compile(r"\d+(?:\.\d+)?|[^\W\d_]+|[.,;:!?\n%]")


def american(text: str) -> str:
    """``text`` in lower case and in one spelling ("Oedema" -> "edema")."""
    text = text.lower()
    text = _PART.sub(lambda match: _PARTS[match.group()], text)
    for pattern, common in _PATTERNS:
        text = pattern.sub(common, text)
    return text


@lru_cache(maxsize=65536)
def comparable(text: str) -> str:
    """What similarity compares: one spelling, lower case, without box spans, tags and control tokens."""
    text = _SPECIAL.sub(" ", from_qwen(text))
    return " ".join(american(_TAGS.sub(" ", text)).split())


def stem(word: str) -> str:
    """A word's singular by rough rules; the same for both texts, which is all that is needed."""
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    if word.endswith(("sses", "shes", "ches", "xes")):
        return word[:-2]
    if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is", "as")):
        return word[:-1]
    return word


def canonical(word: str) -> str:
    """The name a word stands for, else its singular."""
    single = stem(word)
    return NAMES.get(word) or NAMES.get(single) or single


def tokens(text: str) -> list[str]:
    """Words, numbers and clause punctuation of ``comparable(text)``; "isn't" gives "is", "not"."""
    text = re.sub(r"\bcan(?:no|')t\b", "can not", comparable(text))
    text = re.sub(r"n['’]t\b", " not", text)
    return _TOKEN.findall(re.sub(r"['’]s\b", "", text))


def is_content(word: str) -> bool:
    return word[0].isalnum() and word not in STOP


def content_words(text: str) -> list[str]:
    """The canonical words of ``text`` that carry meaning, numbers included, in order."""
    return [canonical(word) for word in tokens(text) if is_content(word)]


def names_in(text: str) -> frozenset[str]:
    """The organs and findings that ``text`` names."""
    return frozenset(name for word in tokens(text) if (name := NAMES.get(word) or NAMES.get(stem(word))))
