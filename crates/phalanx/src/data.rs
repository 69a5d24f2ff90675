//! `phalanx data`.

use std::path::{Path, PathBuf};

use data::{BuildOptions, Source, Summary, TextOptions, Tokenizer, tokenizer_path};
use spec::{Error, Result};

use crate::args::{Data, DataCommand};
use crate::live::Bytes;
use crate::output;

/// Bytes of text that a tokenizer is trained on: more hardly changes a small vocabulary.
const SAMPLE_BYTES: u64 = 8 << 20;

pub(crate) fn run(args: &Data) -> Result<u8> {
    match &args.what {
        DataCommand::Build {
            inputs,
            output,
            tokenizer,
            vocab_size,
            field,
            skip_bad,
            eod,
            threads,
            force,
            json,
        } => {
            keep_others(output, *force)?;
            let mut options = BuildOptions::new(inputs.clone(), output);
            options.text = TextOptions { field: field.clone(), skip_bad: *skip_bad, end: eod.clone() };
            options.threads = (*threads > 0).then(|| output::threads_asked(*threads)).transpose()?;
            build(&options, tokenizer.as_deref(), *vocab_size, *json)
        }
        DataCommand::Show { path, tokenizer, json } => show(path, tokenizer.as_deref(), *json),
    }
}

/// A dataset that is there stays, unless it is to be replaced: a run may be trained on it.
fn keep_others(prefix: &Path, force: bool) -> Result<()> {
    let named = |end: &str| {
        let mut name = prefix.as_os_str().to_owned();
        name.push(end);
        PathBuf::from(name)
    };
    match [".bin", ".idx"].map(named).into_iter().find(|path| path.exists() && !force) {
        Some(there) => {
            Err(Error::user(format!("--output {}: {} is there", prefix.display(), there.display()))
                .hint("name another prefix, or replace the dataset with --force"))
        }
        None => Ok(()),
    }
}

fn build(options: &BuildOptions, tokenizer: Option<&Path>, vocab_size: usize, json: bool) -> Result<u8> {
    if let Some(file) = options.prefix.ancestors().skip(1).find(|p| p.exists() && !p.is_dir()) {
        return Err(Error::user(format!(
            "--output {}: {} is a file",
            options.prefix.display(),
            file.display()
        ))
        .hint("give a prefix in a directory"));
    }
    let p = &options.prefix;
    let is_folder = p.as_os_str().as_encoded_bytes().ends_with(b"/");
    if is_folder || (p.exists() && !p.is_file() && !p.is_dir()) {
        let what = if is_folder { "a directory" } else { "a special file" };
        return Err(Error::user(format!("--output {}: {what}, expected a prefix", p.display()))
            .hint("data/corpus makes data/corpus.bin, data/corpus.idx and what belongs to them"));
    }
    let bytes = Bytes::new();
    let progress = |p| bytes.update(p);
    let mut tokenizer = match tokenizer {
        Some(path) => Tokenizer::load(path)?,
        None => data::train_tokenizer(options, vocab_size, SAMPLE_BYTES, &progress)?,
    };
    if let Some(name) = &options.text.end {
        tokenizer.set_eod(name)?;
    }
    let report = data::build(options, &tokenizer, &progress)
        .map_err(|e| e.hint("give --output a prefix in a writable place with free space"))?;
    drop(bytes);
    let m = &report.manifest;
    if json {
        output::print(&serde_json::to_string_pretty(m).expect("facts are plain data"));
    } else {
        output::print(&format!(
            "{}  {} documents  {} tokens",
            options.prefix.display(),
            m.documents,
            m.tokens
        ));
    }
    m.warnings.iter().for_each(|warning| output::say(&format!("warning: {}", warning)));
    Ok(0)
}

fn show(path: &Path, tokenizer: Option<&Path>, json: bool) -> Result<u8> {
    let source = Source::open(path)?;
    let beside = tokenizer_path(path);
    let tokenizer =
        tokenizer.or(beside.exists().then_some(beside.as_path())).map(Tokenizer::load).transpose()?;
    let summary = data::show(&source, tokenizer.as_ref())?;
    output::print(&if json {
        serde_json::to_string_pretty(&summary).expect("a summary is plain data")
    } else {
        text(&summary)
    });
    Ok(0)
}

fn text(s: &Summary) -> String {
    let mut out = format!(
        "{}\ndocuments  {}\nsequences  {}\ntokens     {} ({})\nlength     {} to {}, median {}, mean {:.1}\nentropy    {:.4} nats per token (unigram), {} distinct, largest {}\n",
        s.name,
        s.documents,
        s.sequences,
        s.tokens,
        s.token_type,
        s.lengths.min,
        s.lengths.max,
        s.lengths.median,
        s.lengths.mean,
        s.unigram_entropy_nats,
        s.distinct_tokens,
        s.max_token,
    );
    let most = s.lengths.histogram.iter().map(|b| b.sequences).max().unwrap_or(1).max(1);
    for b in &s.lengths.histogram {
        let bar = "#".repeat((40 * b.sequences).div_ceil(most) as usize);
        out += &format!("  {:>9}.. {:>9}  {bar}\n", b.from, b.sequences);
    }
    if let Some(first) = &s.first_text {
        out += &format!("first document\n{}\n", spec::printable(first));
    }
    out
}
