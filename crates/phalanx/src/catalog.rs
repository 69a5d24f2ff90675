//! `phalanx catalog`.

use std::fmt::Write as _;

use plan::models::{self, Known};
use plan::strategy::{Named, Strategy};
use serde_json::{Value, json};
use spec::catalog::{Direction, Entry, Field, Sparsity};
use spec::{Catalog, EntryKind, Error, Result, suggest};

use crate::args::{Catalog as Args, CatalogCommand};
use crate::{files, output};

pub(crate) fn run(args: &Args) -> Result<u8> {
    let out = match &args.what {
        CatalogCommand::List { kind, only, catalog, json } => {
            list(&files::catalog(catalog)?, kind.as_deref().or(only.as_deref()), *json)?
        }
        CatalogCommand::Show { name, catalog, json } => show(&files::catalog(catalog)?, name, *json)?,
        CatalogCommand::Check { files: more, json } => {
            let c = files::catalog(more)?.check()?;
            let models = models::all()?.len();
            if *json {
                let counts = json!({
                    "entries": c.entries, "numbers": c.numbers, "ranges": c.ranges,
                    "platforms": c.platforms, "models": models,
                });
                pretty(&counts)
            } else {
                format!(
                    "{} entries, {} numbers with unit, source and date, {} of them ranges, {} platforms, {models} models",
                    c.entries, c.numbers, c.ranges, c.platforms
                )
            }
        }
    };
    output::print(&out);
    Ok(0)
}

fn pretty(value: &Value) -> String {
    serde_json::to_string_pretty(value).expect("text and numbers are JSON")
}

/// Models are no entries of catalogue files, but are listed beside them.
const MODEL: &str = "model";

enum Kind {
    Entry(EntryKind),
    Model,
}

fn kind(name: &str) -> Result<Kind> {
    // Plurals are what people type.
    let word = name.trim().to_lowercase();
    let word =
        word.strip_suffix('s').filter(|w| EntryKind::parse(w).is_some() || *w == MODEL).unwrap_or(&word);
    if word == MODEL {
        return Ok(Kind::Model);
    }
    let known = || EntryKind::ALL.iter().map(|k| k.name()).chain([MODEL]);
    EntryKind::parse(word).map(Kind::Entry).ok_or_else(|| {
        let known: Vec<&str> = known().collect();
        Error::user(format!("unknown kind \"{name}\" of the catalogue")).hint(suggest::hint(word, known))
    })
}

fn list(catalog: &Catalog, only: Option<&str>, json: bool) -> Result<String> {
    let only = only.map(kind).transpose()?;
    let entries = match &only {
        Some(Kind::Model) => Vec::new(),
        Some(Kind::Entry(kind)) => catalog.list(Some(*kind)),
        None => catalog.list(None),
    };
    let models = match &only {
        Some(Kind::Entry(_)) => Vec::new(),
        _ => models::all()?,
    };
    if json {
        let rows = entries.iter().map(|l| {
            json!({
                "kind": l.kind.name(), "name": l.name, "title": l.title, "accelerators": l.accelerators,
            })
        });
        let rows = rows.chain(models.iter().map(model_json));
        return Ok(pretty(&rows.collect()));
    }
    let mut out = String::new();
    let mut row = |kind: &str, name: &str, size: String, title: &str| {
        let line = format!("{kind:<12} {name:<30} {size:>9}  {title}");
        // Writing to a string cannot fail.
        let _ = writeln!(out, "{}", line.trim_end());
    };
    row("kind", "name", "size".into(), "title");
    for l in &entries {
        row(l.kind.name(), &l.name, l.accelerators.map(|n| n.to_string()).unwrap_or_default(), &l.title);
    }
    for m in &models {
        row(MODEL, &m.name, billions(m.params), &m.title);
    }
    Ok(out)
}

fn billions(params: f64) -> String {
    if params < 1e9 { format!("{:.0}M", params / 1e6) } else { format!("{:.1}B", params / 1e9) }
}

fn model_json(m: &Known) -> Value {
    let mut value = serde_json::to_value(m).expect("numbers are JSON");
    value["kind"] = json!(MODEL);
    value
}

fn show(catalog: &Catalog, name: &str, as_json: bool) -> Result<String> {
    let entries = catalog.named(name);
    let wanted = models::find(name).ok().map(|s| s.model.name);
    let models: Vec<Known> =
        models::all()?.into_iter().filter(|m| wanted.as_ref() == Some(&m.name)).collect();
    if models.is_empty()
        && entries.is_err()
        && let Some(named) = Strategy::find(name)
    {
        return Ok(strategy(named, as_json));
    }
    if models.is_empty() {
        let entries = entries.map_err(|e| {
            // The nearest of both lists.
            let (entries, models) = (catalog.names(), models::all().unwrap_or_default());
            let names =
                models.iter().flat_map(|m| std::iter::once(&m.name).chain(&m.aliases)).chain(&entries);
            match suggest::nearest(name, names.map(String::as_str)) {
                Some(near) => Error::user(e.to_string()).hint(format!("did you mean `{near}`?")),
                None => e,
            }
        })?;
        return if as_json { Ok(pretty(&entries_json(catalog, name, &entries))) } else { catalog.show(name) };
    }
    if as_json {
        let mut all = entries.map(|e| entries_json(catalog, name, &e)).unwrap_or(json!([]));
        all.as_array_mut().expect("an array").extend(models.iter().map(model_json));
        return Ok(pretty(&all));
    }
    let mut out = if entries.is_ok() { catalog.show(name)? } else { String::new() };
    for m in &models {
        let shape = models::find(&m.name)?;
        let s = &shape.model;
        let _ = write!(
            out,
            "{MODEL} {}: {}\n  parameters    {} ({} used by each token)\n  layers        {}\n  hidden        {}\n  \
             ffn           {}\n  heads         {} of {}, {} for keys and values\n  vocabulary    {}\n",
            m.name,
            m.title,
            billions(m.params),
            billions(m.active_params),
            s.layers,
            s.hidden,
            s.ffn,
            s.heads,
            s.head_dim,
            s.kv_heads,
            s.vocab,
        );
        if let Some(e) = &shape.experts {
            let _ = writeln!(
                out,
                "  experts       {} of {}, {} for each token, in {} layers",
                e.count,
                e.ffn,
                e.top_k,
                shape.expert_layers()
            );
        }
        let names = if m.aliases.is_empty() { "none".to_owned() } else { m.aliases.join(", ") };
        let _ = write!(
            out,
            "  other names   {names}\n  trains here   {}\n  source        {} ({})\n",
            if m.trains { "yes" } else { "no, priced only" },
            m.source,
            m.date
        );
    }
    Ok(out)
}

fn strategy(named: &Named, as_json: bool) -> String {
    let (name, others) = (named.names[0], named.names[1..].join(", "));
    if as_json {
        let plan = format!("--layout {name}");
        return pretty(&json!([{
            "kind": "strategy", "name": name, "aliases": named.names[1..], "what": named.what, "plan": plan,
        }]));
    }
    format!(
        "strategy {name}: {}\n  other names   {others}\n  plan          phalanx plan ... --layout {name}\n",
        named.what
    )
}

fn entries_json(catalog: &Catalog, name: &str, entries: &[&Entry]) -> Value {
    let all = entries.iter().map(|entry| {
        let fields = entry.fields.iter().map(|(key, field)| (key.clone(), field_json(catalog, field)));
        let fields: serde_json::Map<String, Value> = fields.collect();
        let mut value = json!({
            "kind": entry.kind.name(), "name": entry.name, "place": entry.place, "fields": fields,
        });
        if entry.kind == EntryKind::Platform
            && let Ok(cluster) = catalog.cluster(name, None)
        {
            value["accelerators"] = json!(cluster.accelerators);
        }
        value
    });
    all.collect()
}

fn field_json(catalog: &Catalog, field: &Field) -> Value {
    let q = match field {
        Field::Text(text) | Field::Ref(text) => return json!(text),
        Field::List(all) => return json!(all),
        Field::Flag(flag) => return json!(flag),
        Field::Number(q) => q,
    };
    let per = q.measure.value / q.written;
    let mut value = json!({
        "value": q.written,
        "low": q.measure.low / per,
        "high": q.measure.high / per,
        "unit": q.unit,
        "source": q.source,
        "date": q.date,
        "base_value": q.measure.value,
    });
    if let Some(source) = catalog.source(&q.source) {
        value["source_what"] = json!(source.what);
        value["source_grade"] = json!(source.grade);
    }
    if let Some(direction) = q.direction {
        value["direction"] = json!(match direction {
            Direction::OneWay => "one-way",
            Direction::BothWays => "both-ways",
        });
    }
    if let Some(sparsity) = q.sparsity {
        value["sparsity"] = json!(match sparsity {
            Sparsity::Dense => "dense",
            Sparsity::Sparse2To4 => "sparse",
        });
    }
    if let Some(note) = &q.note {
        value["note"] = json!(note);
    }
    value
}
