"""Bodies that work when pasted, one for each operation that takes one; tests send them. Ids, and the model, must exist."""

from collections.abc import Mapping
from typing import Any

from service.api.shapes import BENCHMARKS_PATH, FILES_PATH, JOBS_PATH, REQUESTS_PATH

MODEL = "people"
FILE = "ufile_01a1fcec671473df88444d2cf2416c40"
FORGET = {"question": "Where does Ada Lindqvist live?", "answer": "In Ghent, above the bakery."}
RETAIN = {"question": "What is the capital of Belgium?", "answer": "Brussels."}
RECIPE = {"method": {"type": "pdu"}, "constraint": {"epsilon_relative": 0.25}}
REQUEST = {
    "external_reference": "DSR-2041",
    "regulation": "gdpr",
    "models": [MODEL],
    "forget_set": [FORGET],
    "subjects": ["ada@example.org"],
}

EXAMPLES: Mapping[tuple[str, str], Any] = {
    ("post", JOBS_PATH): {"model": MODEL, **RECIPE, "forget_set": [FORGET], "retain_set": [RETAIN]},
    ("post", REQUESTS_PATH): REQUEST,
    ("post", f"{REQUESTS_PATH}/batch"): {"requests": [REQUEST]},
    ("post", f"{REQUESTS_PATH}/search"): {"subject": "ada@example.org", "status": "completed"},
    ("post", f"{REQUESTS_PATH}/{{request_id}}/deny"): {"reason": "no_match", "note": "not in the training data"},
    ("post", f"{REQUESTS_PATH}/{{request_id}}/extend"): {"reason": "many requests at once"},
    ("post", f"{REQUESTS_PATH}/{{request_id}}/close"): {"reason": "the model is withdrawn"},
    ("put", "/v1/deletion-plans/{model}"): {
        "job": {**RECIPE, "retain_set": FILE},
        "window_seconds": 86_400,
        "requests_max": 20,
    },
    ("post", FILES_PATH): {"purpose": "forget_set", "file": '{"text": "Ada Lindqvist lives in Ghent."}\n'},
    ("post", BENCHMARKS_PATH): {
        "name": "news",
        "suite": "muse",
        "corpus": "MUSE News",
        "sets": {"forget": FILE, "holdout": FILE},
    },
    ("post", "/v1/api-keys"): {"name": "the nightly pipeline", "role": "mlops"},
    ("post", "/v1/webhook-endpoints"): {
        "url": "https://93.184.215.14/unlearning",
        "description": "the compliance desk",
        "event_types": ["unlearning.job.succeeded", "unlearning.job.failed"],
    },
}
