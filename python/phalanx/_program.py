"""The program that the wheel brings, asked for data."""

import json
import os
import shutil
import subprocess
import sysconfig


def path():
    """The program ``phalanx`` of this installation, or else the one on ``PATH``.

    Raises ``FileNotFoundError`` if there is none.
    """
    for scheme in (None, sysconfig.get_preferred_scheme("user") if hasattr(sysconfig, "get_preferred_scheme") else None):
        scripts = sysconfig.get_path("scripts", scheme) if scheme else sysconfig.get_path("scripts")
        candidate = os.path.join(scripts, "phalanx")
        if os.access(candidate, os.X_OK) and os.path.isfile(candidate):
            return candidate
    found = shutil.which("phalanx")
    if found is None:
        raise FileNotFoundError("no program phalanx: reinstall the wheel, or put the program on PATH")
    return found


def run(*args):
    """What the program prints for ``args``, as text.

    Raises ``ValueError`` with what was wrong and a hint if the input was wrong, ``RuntimeError`` if something failed.
    """
    command = [path(), *map(str, args)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode == 0:
        return done.stdout
    said = done.stderr.strip().removeprefix("error: ") or f"{' '.join(command)} ended with {done.returncode}"
    raise (ValueError if done.returncode == 2 else RuntimeError)(said)


def plan(model, cluster, **options):
    """The best layouts of a model on a cluster, as ``phalanx plan --json`` answers.

    ``model`` is a name of the catalogue, the path of a Hugging Face ``config.json`` or of a run file; ``cluster`` a name
    of the catalogue. Options are those of ``phalanx plan``: ``plan("llama3-8b", "dgx-h100", accelerators=64,
    tokens="1T", layout="tp=8")``; ``True`` gives a flag without value.

    Raises ``ValueError`` for wrong input, with a hint; also for a ``layout`` that does not fit.
    """
    return _ask("plan", {"model": model, "cluster": cluster, **options})


def decide(platform, profile, **options):
    """Build or rent, as ``phalanx decide --json`` answers; options are those of ``phalanx decide``."""
    return _ask("decide", {"platform": platform, "profile": profile, **options})


def inference(model, cluster, **options):
    """What serving a model takes and costs, as ``phalanx inference --json`` answers; options likewise."""
    return _ask("inference", {"model": model, "cluster": cluster, **options})


def _ask(command, options):
    args = [command, "--json"]
    for name, value in options.items():
        flag = "--" + name.rstrip("_").replace("_", "-")
        if value is True:
            args.append(flag)
        elif value is not None and value is not False:
            values = value if isinstance(value, (list, tuple)) else [value]
            # With `=`, so that a value may begin with a dash.
            args.extend(f"{flag}={one}" for one in values)
    return json.loads(run(*args))
