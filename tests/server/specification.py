"""schemathesis over OpenAI's published specification, for what is served here: `make specification`.

`python -m tests.server.specification OPENAPI.yaml` makes at least 5,000 requests of a seeded server, right and wrong
ones, and looks for errors of the server, replies of another shape than the specification's, and bodies that it forbids
and the server accepts. Then it counts which of the specification's properties are served. schemathesis is fetched for
the run; the specification is openapi.yaml of github.com/openai/openai-openapi.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from tests.server.scenes import free_port, pip_refuses, server_answers, wait_for
from tests.server.seeded import JOB, MODELS, PART, UPLOAD
from tests.server.share import shares

Json = dict[str, Any]
LATER = re.compile(r"/chat/completions/|/fine_tuning/alpha/")  # stored chats, graders
PLACES = {
    "file_id": "file-abc123",
    "upload_id": UPLOAD,
    "fine_tuning_job_id": JOB,
    "model": MODELS[0],
    "fine_tuned_model_checkpoint": MODELS[1],
    "permission_id": "cp_zc4Q7MP6XxulcVzj4MZdwsAB",
}
"""What the seeded server has, in the place of an id that nothing has. Ids in bodies: see `HOOKS`."""
HOOKS = f"""
import schemathesis

KNOWN = {{"model": "fork-tiny", "training_file": "file-abc123", "validation_file": "file_id"}}

@schemathesis.hook
def map_body(context, body):
    # An id that is a string is as right or wrong as before, and the rest of the body is looked at.
    if isinstance(body, dict):
        body |= {{name: id for name, id in KNOWN.items() if isinstance(body.get(name), str) and body[name]}}
        parts = body.get("part_ids")
        if isinstance(parts, list) and parts and all(isinstance(part, str) for part in parts):
            body["part_ids"] = [{PART!r}]
    return body
"""
OPTIONS = (
    *("--checks", "not_a_server_error,negative_data_rejection,response_schema_conformance,content_type_conformance"),
    *("--phases", "coverage,fuzzing", "--continue-on-failure", "--generation-deterministic", "--no-shrink"),
    *("--suppress-health-check", "all", "--warnings", "off", "--request-timeout", "60", "--no-color"),
)
SECONDS = 900


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("specification", type=Path)
    parser.add_argument("--cases", type=int, default=150, help="fuzzed cases an operation, each right and wrong")
    given = parser.parse_args()
    whole = yaml.load(given.specification.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader)
    served = {
        path: {verb: operation for verb, operation in item.items() if (verb, path) != ("get", "/chat/completions")}
        for path, item in whole["paths"].items()
        if re.match(r"/(files|uploads|fine_tuning|models|chat/completions|completions)", path)
        and not LATER.search(path)
    }
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        if why := pip_refuses("install", "--target", str(place / "needed"), "schemathesis"):
            print(f"specification: skipped, since schemathesis cannot be had here ({why})")
            return 0
        return _attacked(_freed(_mended({**whole, "paths": served})), place, given.cases)


def _mended(node: Any) -> Any:
    """The specification says that it is of OpenAPI 3.1 and has words of 3.0 in it, which mean nothing in 3.1."""
    if isinstance(node, list):
        return [_mended(item) for item in node]
    if not isinstance(node, dict):
        return node
    made = {name: _mended(value) for name, value in node.items() if name not in ("x-oaiMeta", "example", "examples")}
    if made.get("exclusiveMinimum") is True:
        made["exclusiveMinimum"] = made.pop("minimum")
    if made.pop("nullable", False) is True:
        return {"anyOf": [made, {"type": "null"}]}
    return made


def _freed(specification: Json) -> Json:
    """Without what no server can hold: where it contradicts itself, or tells apart what is the same in a URL."""
    files = specification["components"]["schemas"]["OpenAIFile"]["properties"]
    files["purpose"]["enum"].append("evals")  # which a file may be created with
    content = specification["paths"]["/files/{file_id}/content"]["get"]["responses"]["200"]
    content["content"] = {"application/octet-stream": {}}  # bytes as they came, said to be a string of JSON
    for parameter in specification["paths"]["/fine_tuning/jobs"]["get"]["parameters"]:
        if parameter["name"] == "metadata":  # a number in a URL is as good a text as any
            parameter["schema"]["anyOf"][0]["additionalProperties"] = {}
    return specification


def _attacked(specification: Json, place: Path, cases: int) -> int:
    (place / "openapi.json").write_text(json.dumps(specification))
    (place / "hooks.py").write_text(HOOKS)
    known = "\n".join(f'"path.{name}" = "{id}"' for name, id in PLACES.items())
    (place / "schemathesis.toml").write_text(f"[parameters]\n{known}\n")
    port = free_port()
    server = subprocess.Popen([sys.executable, "-m", "tests.server.seeded", str(port), str(place / "key")])
    try:
        wait_for(lambda: server.poll() is not None or server_answers(f"http://127.0.0.1:{port}/healthz"))
        url, key = f"http://127.0.0.1:{port}/v1", (place / "key").read_text()
        options = [*OPTIONS, "--url", url, "--header", f"Authorization: Bearer {key}", "--max-examples", str(cases)]
        surroundings = {**os.environ, "PYTHONPATH": f"{place / 'needed'}:{place}", "SCHEMATHESIS_HOOKS": "hooks"}
        command = [sys.executable, "-c", "from schemathesis.cli import schemathesis; schemathesis()", "run"]
        done = subprocess.run([*command, "openapi.json", *options], cwd=place, env=surroundings, timeout=SECONDS)
        print(shares(specification, url, key))
        return done.returncode
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    sys.exit(main())
