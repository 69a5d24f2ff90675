"""Holds manifests to what an API server would refuse.

    check.py FOLDER_OF_CRDS FILE...

Custom resources are held to the schemas of their definitions (CustomResourceDefinition, one YAML file each): unknown fields,
types, enumerations, required fields, bounds, patterns, and the rules in CEL that compare nothing with an earlier version.
Everything else goes to kubernetes-validate in its strict mode. Prints one line for each problem; exit code 1 if there is any.

Needs PyYAML, jsonschema, cel-python and kubernetes-validate.
"""

import functools
import pathlib
import sys

import celpy
import jsonschema
import kubernetes_validate
import yaml

CORE = "1.34"


def main(crds, files):
    schemas = dict(definitions(crds))
    problems = []
    for file in files:
        for i, document in enumerate(yaml.safe_load_all(pathlib.Path(file).read_text())):
            kind = (document.get("apiVersion"), document.get("kind"))
            if kind in schemas:
                found = custom(schemas[kind], document)
            elif "." in str(kind[0]).split("/")[0] and not str(kind[0]).split("/")[0].endswith(".k8s.io"):
                found = [f"no definition of {kind}"]
            else:
                found = core(document)
            problems += [f"{file}: document {i}, {kind[1]}: {problem}" for problem in found]
    print("\n".join(problems))
    return 1 if problems else 0


def definitions(folder):
    """Schemas by (apiVersion, kind)."""
    for file in sorted(pathlib.Path(folder).glob("*.yaml")):
        for crd in yaml.load_all(file.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
            spec = crd["spec"]
            for version in spec["versions"]:
                name = f"{spec['group']}/{version['name']}"
                yield (name, spec["names"]["kind"]), version["schema"]["openAPIV3Schema"]


def core(document):
    try:
        kubernetes_validate.validate(document, CORE, strict=True)
        return []
    except Exception as e:  # Every class of error of the package is a refusal.
        return [str(getattr(e, "message", e)).splitlines()[0]]


def custom(schema, document):
    metadata = document.get("metadata") or {}
    strict = closed(schema)
    # The server knows metadata by itself.
    strict["properties"]["metadata"] = {"type": "object", "required": ["name"]}
    errors = jsonschema.Draft7Validator(strict).iter_errors(document)
    found = ["/".join(map(str, e.path)) + ": " + e.message[:200] for e in errors]
    return found or list(rules(schema, {**document, "metadata": metadata}, ""))


def closed(schema):
    """The schema in JSON Schema's words: what it does not name is refused."""
    if not isinstance(schema, dict):
        return schema
    out = dict(schema)
    if "properties" in out:
        out["properties"] = {name: closed(inner) for name, inner in out["properties"].items()}
        if "additionalProperties" not in out and not out.get("x-kubernetes-preserve-unknown-fields"):
            out["additionalProperties"] = False
    for key in ("items", "additionalProperties", "not"):
        if key in out:
            out[key] = closed(out[key])
    for key in ("allOf", "anyOf", "oneOf"):
        if key in out:
            # Parts of an object: what they do not name, the whole does.
            out[key] = [part for part in out[key]]
    if out.get("x-kubernetes-int-or-string"):
        out.pop("type", None)
        out.pop("anyOf", None)
        out["type"] = ["integer", "string"]
    if out.pop("nullable", False) and "type" in out:
        out["type"] = [out["type"], "null"]
    out.pop("format", None)
    return out


@functools.cache
def program(rule):
    environment = celpy.Environment()
    return environment.program(environment.compile(rule))


def rules(schema, value, at):
    """Messages of the rules that do not hold, from here down."""
    for rule in schema.get("x-kubernetes-validations", []):
        if "oldSelf" in rule["rule"]:
            continue
        if not program(rule["rule"]).evaluate({"self": celpy.json_to_cel(value)}):
            yield f"{at or '/'}: {rule.get('message', rule['rule'])}"
    if isinstance(value, dict):
        for key, inner in value.items():
            below = schema.get("properties", {}).get(key, schema.get("additionalProperties"))
            if isinstance(below, dict):
                yield from rules(below, inner, f"{at}/{key}")
    if isinstance(value, list) and isinstance(schema.get("items"), dict):
        for i, inner in enumerate(value):
            yield from rules(schema["items"], inner, f"{at}/{i}")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1], sys.argv[2:]))
