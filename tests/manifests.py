"""Holds Kubernetes objects against their schemas, strictly: a field that no schema knows is an error.

Custom resources are checked against the structural schema of their CRD, built-in kinds against the schemas of
``kubernetes-validate``. An API server prunes unknown fields of custom resources without a word, so a misspelt field
would otherwise do nothing and say nothing.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import kubernetes_validate
import yaml
from jsonschema_rs import Draft202012Validator, Registry, ValidationError

from kube import loader

KUBERNETES = "1.34"
Schema = dict[str, Any]


class Schemas:
    """The schemas of a cluster: its CRDs, and what Kubernetes itself brings."""

    def __init__(self, crds: Path) -> None:
        self._crds: dict[tuple[str, str], tuple[Draft202012Validator, Schema]] = {}
        for path in sorted(crds.glob("*.yaml")):
            self._add(yaml.load(path.read_text(), Loader=loader()))

    def _add(self, crd: Mapping[str, Any]) -> None:
        spec = crd["spec"]
        for version in spec["versions"]:
            schema = version["schema"]["openAPIV3Schema"]
            validator = Draft202012Validator(closed(schema, is_object=True))
            self._crds[f"{spec['group']}/{version['name']}", spec["names"]["kind"]] = (validator, schema)

    def errors(self, manifest: Mapping[str, Any]) -> list[str]:
        """What is wrong with an object, each line with the field; empty where nothing is."""
        known = self._crds.get((manifest["apiVersion"], manifest["kind"]))
        if known is None:
            return _builtin_errors(manifest)
        validator, schema = known
        return [*map(_line, validator.iter_errors(manifest)), *duplicates(schema, manifest, "")]


def closed(schema: Schema, *, is_object: bool = False) -> Schema:
    """A structural schema as JSON Schema in which an object has only the fields that are named."""
    out = dict(schema)
    if out.pop("x-kubernetes-int-or-string", False):
        out.pop("type", None)
        out["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    if "properties" in out:
        out["properties"] = {name: closed(part) for name, part in out["properties"].items()}
    for key in ("items", "additionalProperties"):
        if isinstance(out.get(key), dict):
            out[key] = closed(out[key])
    if is_object or out.get("x-kubernetes-embedded-resource"):
        known = {"apiVersion": {"type": "string"}, "kind": {"type": "string"}, "metadata": {"type": "object"}}
        out["properties"] = {**out.get("properties", {}), **known}
    is_open = "additionalProperties" in out or out.get("x-kubernetes-preserve-unknown-fields")
    if out.get("type") == "object" and not is_open:
        out["additionalProperties"] = False
    if out.pop("nullable", False) and "type" in out:
        out["type"] = [out["type"], "null"]
    return out


def duplicates(schema: Schema, value: object, path: str) -> Iterator[str]:
    """Items of a list map that share their key, which JSON Schema cannot say."""
    if isinstance(value, dict):
        properties, others = schema.get("properties") or {}, schema.get("additionalProperties")
        for key, part in value.items():
            below = properties.get(key) or (others if isinstance(others, dict) else None)
            if below:
                yield from duplicates(below, part, f"{path}.{key}".lstrip("."))
    elif isinstance(value, list):
        items = schema.get("items") or {}
        if schema.get("x-kubernetes-list-type") == "map":
            keys = [
                tuple(repr(_keyed(items, item, key)) for key in schema["x-kubernetes-list-map-keys"]) for item in value
            ]
            yield from (f"{path}: duplicate key {key}" for key in sorted({k for k in keys if keys.count(k) > 1}))
        for index, part in enumerate(value):
            yield from duplicates(items, part, f"{path}.{index}")


def _keyed(items: Schema, item: Mapping[str, Any], key: str) -> object:
    return item.get(key, (items.get("properties", {}).get(key) or {}).get("default"))


def _builtin_errors(manifest: Mapping[str, Any]) -> list[str]:
    validator = _builtin_validator(manifest["apiVersion"], manifest["kind"])
    return [_line(error) for error in validator.iter_errors(manifest)]


@functools.cache
def _builtin_validator(api_version: str, kind: str) -> Draft202012Validator:
    """The package's own ``validate`` reads all definitions of Kubernetes for each object; this reads them once."""
    group, _, version = api_version.rpartition("/")
    name = "-".join(part for part in (kind.lower(), group.partition(".")[0], version) if part)
    schema = json.loads((_builtin_schemas() / f"{name}.json").read_text())
    return Draft202012Validator(schema, registry=_definitions())


@functools.cache
def _definitions() -> Registry:
    definitions = json.loads((_builtin_schemas() / "_definitions.json").read_text())
    return Registry([(definitions["$id"], definitions)])


@functools.cache
def _builtin_schemas() -> Path:
    folder = Path(kubernetes_validate.__file__).parent / "kubernetes-json-schema"
    (found,) = folder.glob(f"v{KUBERNETES}.*-local-strict")
    return found


def _line(error: ValidationError) -> str:
    return f"{'.'.join(map(str, error.instance_path))}: {error.message[:200]}"


def pods(manifest: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every pod template in an object, with where it stands."""
    spec = manifest.get("spec", {})
    if manifest["kind"] == "RayJob":
        if submitter := spec.get("submitterPodTemplate"):
            yield "submitter", submitter
        if "clusterSelector" in spec:
            return
        spec = spec["rayClusterSpec"]
    if manifest["kind"] in ("RayCluster", "RayJob"):
        yield "head", spec["headGroupSpec"]["template"]
        for group in spec.get("workerGroupSpecs", []):
            yield group["groupName"], group["template"]
    elif manifest["kind"] == "StatefulSet":
        yield "redis", spec["template"]
    elif manifest["kind"] == "Pod":
        yield "pod", {"metadata": manifest["metadata"], "spec": spec}
