//! A reader of pickles that executes nothing.
//!
//! It knows the opcodes that PyTorch's checkpoints use and a list of names ([`Global`]) that stand for data; every other
//! opcode and every other name is refused. Values lie in flat tables: no recursion, whatever a file nests, and no more
//! memory than a fixed multiple of its length. Opcodes: `pickletools` of Python's standard library.

use super::arena::Arena;
use super::globals::Global;

/// Values on the stack: writers put containers together from at most a thousand items at a time.
const MAX_STACK: usize = 8192;

/// Bytes of tables for each byte of a file. Files that PyTorch writes take about 4.
const TABLE_BYTES_PER_BYTE: usize = 8;

/// And for any file.
const FREE_TABLE_BYTES: usize = 64 << 10;

/// Keys that the state of an object has.
const MAX_STATE_KEYS: usize = 16;

/// Longest integer that is read.
const MAX_INT_BYTES: usize = 8;

/// Longest name of a module.
const MAX_NAME_BYTES: usize = 256;

const NOWHERE: u32 = u32::MAX;

/// A value of a pickle.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Value {
    None,
    Bool(bool),
    /// A number or a text: where its opcode stands.
    Scalar(u32),
    Global(Global),
    Node(u32),
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Kind {
    Tuple,
    List,
    Dict,
    /// Its items are arguments and state.
    Object(Global),
}

/// A container; its items lie in one run of the item table for each time that some were added.
#[derive(Clone, Copy, Debug)]
struct Node {
    kind: Kind,
    first: u32,
    last: u32,
}

#[derive(Clone, Copy, Debug)]
struct Run {
    start: u32,
    len: u32,
    next: u32,
}

/// A pickle that was read.
#[derive(Debug)]
pub(crate) struct Pickle<'a> {
    bytes: &'a [u8],
    nodes: Arena<Node>,
    runs: Arena<Run>,
    items: Arena<Value>,
    pub(crate) root: Value,
}

impl<'a> Pickle<'a> {
    /// Reads a pickle to its end.
    ///
    /// # Errors
    /// What is refused, with opcode and offset.
    pub(crate) fn read(bytes: &'a [u8]) -> Result<Self, String> {
        if bytes.len() >= NOWHERE as usize {
            return Err(format!("a pickle of {} bytes is too long", bytes.len()));
        }
        let tables = Pickle {
            bytes,
            nodes: Arena::default(),
            runs: Arena::default(),
            items: Arena::default(),
            root: Value::None,
        };
        let mut machine = Machine {
            out: tables,
            at: 0,
            opcode: 0,
            stack: Vec::new(),
            marks: Vec::new(),
            memo: Arena::default(),
        };
        loop {
            let (start, opcode) = (machine.at, bytes.get(machine.at).copied());
            let step = machine.step();
            match step {
                Ok(true) => return Ok(machine.out),
                Ok(false) => {}
                Err(why) => {
                    let opcode = opcode.map_or("the end".to_owned(), |op| format!("opcode 0x{op:02x}"));
                    return Err(format!("{opcode} at byte {start}: {why}"));
                }
            }
        }
    }

    pub(crate) fn kind(&self, value: Value) -> Option<Kind> {
        match value {
            Value::Node(n) => Some(self.nodes.get(n).kind),
            _ => None,
        }
    }

    /// The items of a tuple or a list; keys and values of a dictionary in turn.
    pub(crate) fn items(&self, value: Value) -> impl Iterator<Item = Value> + '_ {
        let mut next = match value {
            Value::Node(n) => self.nodes.get(n).first,
            _ => NOWHERE,
        };
        let runs = std::iter::from_fn(move || {
            let run = (next != NOWHERE).then(|| self.runs.get(next))?;
            next = run.next;
            Some(run)
        });
        runs.flat_map(|run| (run.start..run.start + run.len).map(|i| self.items.get(i)))
    }

    /// The entries of a dictionary.
    pub(crate) fn entries(&self, dict: Value) -> Result<impl Iterator<Item = (Value, Value)> + '_, String> {
        if self.kind(dict) != Some(Kind::Dict) {
            return Err("expected a dictionary".into());
        }
        let mut items = self.items(dict);
        Ok(std::iter::from_fn(move || items.next().zip(items.next())))
    }

    /// An attribute of an object, none if it is missing.
    pub(crate) fn attribute(&self, object: Value, name: &str) -> Result<Value, String> {
        let state = self.items(object).nth(1).unwrap_or(Value::None);
        let mut found = Value::None;
        for (i, (key, value)) in self.entries(state)?.enumerate() {
            if i >= MAX_STATE_KEYS {
                return Err(format!("an object with more than {MAX_STATE_KEYS} attributes"));
            }
            if self.text(key)? == name {
                found = value;
            }
        }
        Ok(found)
    }

    pub(crate) fn text(&self, value: Value) -> Result<&'a str, String> {
        let Value::Scalar(at) = value else { return Err("expected text".into()) };
        let (start, len) = text_at(self.bytes, at as usize).ok_or("expected text")?;
        std::str::from_utf8(&self.bytes[start..start + len]).map_err(|_| "text that is not UTF-8".into())
    }

    pub(crate) fn int(&self, value: Value) -> Result<i64, String> {
        let wrong = || "expected a whole number".to_owned();
        let Value::Scalar(at) = value else { return Err(wrong()) };
        let at = at as usize;
        let (start, len, signed) = match self.bytes[at] {
            b'K' => (at + 1, 1, false),
            b'M' => (at + 1, 2, false),
            b'J' => (at + 1, 4, true),
            0x8a => (at + 2, usize::from(self.bytes[at + 1]), true),
            _ => return Err(wrong()),
        };
        let digits = &self.bytes[start..start + len];
        let negative = signed && digits.last().is_some_and(|b| b & 0x80 != 0);
        let mut wide = [if negative { 0xff } else { 0 }; MAX_INT_BYTES];
        wide[..len].copy_from_slice(digits);
        Ok(i64::from_le_bytes(wide))
    }

    /// A whole number from 0.
    pub(crate) fn count(&self, value: Value) -> Result<u64, String> {
        let n = self.int(value)?;
        u64::try_from(n).map_err(|_| format!("{n}, expected a number from 0"))
    }
}

/// Where the text lies whose opcode stands at `at`.
fn text_at(bytes: &[u8], at: usize) -> Option<(usize, usize)> {
    let number = |n: usize| {
        let mut wide = [0; 8];
        wide[..n].copy_from_slice(bytes.get(at + 1..at + 1 + n)?);
        Some((at + 1 + n, usize::try_from(u64::from_le_bytes(wide)).ok()?))
    };
    match bytes[at] {
        0x8c => number(1),
        b'X' => number(4),
        0x8d => number(8),
        _ => None,
    }
}

struct Machine<'a> {
    out: Pickle<'a>,
    at: usize,
    opcode: u8,
    stack: Vec<Value>,
    /// Heights of the stack.
    marks: Vec<usize>,
    memo: Arena<Value>,
}

impl<'a> Machine<'a> {
    /// Does what the next opcode says; true at the end.
    fn step(&mut self) -> Result<bool, String> {
        let start = self.at;
        self.opcode = self.take(1)?[0];
        let scalar = Value::Scalar(start as u32);
        match self.opcode {
            0x80 => match self.take(1)?[0] {
                2..=5 => {}
                other => return Err(format!("protocol {other}, expected 2 to 5")),
            },
            0x95 => {
                self.take(8)?;
            }
            b'.' => {
                let root = self.pop()?;
                if !self.stack.is_empty() || !self.marks.is_empty() || self.at != self.out.bytes.len() {
                    return Err("it ends before everything is used".into());
                }
                self.out.root = root;
                return Ok(true);
            }
            b'N' => self.push(Value::None)?,
            0x88 | 0x89 => self.push(Value::Bool(self.opcode == 0x88))?,
            b'K' | b'M' | b'J' | b'G' => {
                let len = match self.opcode {
                    b'K' => 1,
                    b'M' => 2,
                    b'J' => 4,
                    _ => 8,
                };
                self.take(len)?;
                self.push(scalar)?;
            }
            0x8a => {
                let len = usize::from(self.take(1)?[0]);
                if len > MAX_INT_BYTES {
                    return Err(format!("a number of {len} bytes"));
                }
                self.take(len)?;
                self.push(scalar)?;
            }
            0x8c | b'X' | 0x8d => {
                let (begin, len) = text_at(self.out.bytes, start).ok_or("cut short")?;
                self.at = begin;
                if std::str::from_utf8(self.take(len)?).is_err() {
                    return Err("text that is not UTF-8".into());
                }
                self.push(scalar)?;
            }
            b'q' | b'r' | 0x94 | b'h' | b'j' => self.remember()?,
            b'c' | 0x93 | 0x81 | b'R' | b'b' | b'Q' => self.objects()?,
            _ => self.containers()?,
        }
        Ok(false)
    }

    fn remember(&mut self) -> Result<(), String> {
        let index = match self.opcode {
            0x94 => self.memo.len(),
            b'q' | b'h' => u32::from(self.take(1)?[0]),
            _ => self.take(4)?.iter().rev().fold(0, |n, b| n << 8 | u32::from(*b)),
        };
        if matches!(self.opcode, b'h' | b'j') {
            if index >= self.memo.len() {
                return Err(format!("nothing was remembered as {index}"));
            }
            return self.push(self.memo.get(index));
        }
        let top = *self.stack.last().ok_or("the stack is empty")?;
        match index.cmp(&self.memo.len()) {
            std::cmp::Ordering::Less => self.memo.set(index, top),
            std::cmp::Ordering::Equal => {
                self.memo.push(top);
            }
            std::cmp::Ordering::Greater => return Err(format!("{index} is remembered out of turn")),
        }
        self.charge()
    }

    fn containers(&mut self) -> Result<(), String> {
        match self.opcode {
            b'(' => {
                if self.marks.len() >= MAX_STACK {
                    return Err(format!("more than {MAX_STACK} marks"));
                }
                self.marks.push(self.stack.len());
                Ok(())
            }
            b')' => self.make(Kind::Tuple, 0),
            b']' => self.make(Kind::List, 0),
            b'}' => self.make(Kind::Dict, 0),
            b't' => {
                let n = self.marked()?;
                self.make(Kind::Tuple, n)
            }
            0x85..=0x87 => self.make(Kind::Tuple, usize::from(self.opcode - 0x84)),
            b'a' => self.add(Kind::List, 1),
            b's' => self.add(Kind::Dict, 2),
            b'e' => {
                let n = self.marked()?;
                self.add(Kind::List, n)
            }
            b'u' => match self.marked()? {
                n if n % 2 == 0 => self.add(Kind::Dict, n),
                n => Err(format!("{n} keys and values")),
            },
            _ => Err("this opcode is not read".into()),
        }
    }

    fn objects(&mut self) -> Result<(), String> {
        match self.opcode {
            b'c' => {
                let (module, name) = (self.line()?, self.line()?);
                let global = Global::find(module, name)?;
                self.push(Value::Global(global))
            }
            0x93 => {
                let (name, module) = (self.pop()?, self.pop()?);
                let global = Global::find(self.out.text(module)?, self.out.text(name)?)?;
                self.push(Value::Global(global))
            }
            b'Q' => {
                let what = self.pop()?;
                self.object(Global::Persistent, what)
            }
            b'b' => {
                let (state, object) = (self.pop()?, *self.stack.last().ok_or("the stack is empty")?);
                match (object, self.out.kind(object)) {
                    (Value::Node(n), Some(Kind::Object(_))) => {
                        let run = self.out.runs.get(self.out.nodes.get(n).first);
                        self.out.items.set(run.start + 1, state);
                        Ok(())
                    }
                    _ => Err("state for what is no object".into()),
                }
            }
            _ => {
                let (args, callee) = (self.pop()?, self.pop()?);
                let Value::Global(global) = callee else { return Err("a call of what is no name".into()) };
                if self.out.kind(args) != Some(Kind::Tuple) {
                    return Err("arguments that are no tuple".into());
                }
                self.call(global, args)
            }
        }
    }

    /// What a name makes of its arguments: always data.
    fn call(&mut self, global: Global, args: Value) -> Result<(), String> {
        let new = self.opcode == 0x81;
        match global {
            Global::Size if !new => {
                let dims = self.out.items(args).next().unwrap_or(Value::None);
                if self.out.kind(dims) != Some(Kind::Tuple) {
                    return Err("torch.Size of what is no tuple".into());
                }
                self.push(dims)
            }
            Global::OrderedDict if !new => self.make(Kind::Dict, 0),
            Global::Nothing if !new => self.push(Value::None),
            Global::RebuildTensor if !new => self.object(global, args),
            _ if new && global.is_class() => self.object(global, args),
            other => Err(format!("a call of {other:?}")),
        }
    }

    fn object(&mut self, class: Global, args: Value) -> Result<(), String> {
        self.push(args)?;
        self.push(Value::None)?;
        self.make(Kind::Object(class), 2)
    }

    /// A container of the topmost `n` values.
    fn make(&mut self, kind: Kind, n: usize) -> Result<(), String> {
        let run = self.store(n)?;
        let node = self.out.nodes.push(Node { kind, first: run, last: run });
        self.charge()?;
        self.push(Value::Node(node))
    }

    /// Adds the topmost `n` values to the container below them.
    fn add(&mut self, kind: Kind, n: usize) -> Result<(), String> {
        let run = self.store(n)?;
        let target = *self.stack.last().ok_or("the stack is empty")?;
        let Value::Node(at) = target else { return Err(format!("items for what is no {kind:?}")) };
        let mut node = self.out.nodes.get(at);
        if node.kind != kind {
            return Err(format!("items for what is no {kind:?}"));
        }
        if run != NOWHERE {
            if node.first == NOWHERE {
                node.first = run;
            } else {
                let last = self.out.runs.get(node.last);
                self.out.runs.set(node.last, Run { next: run, ..last });
            }
            node.last = run;
            self.out.nodes.set(at, node);
        }
        Ok(())
    }

    /// Moves the topmost `n` values to the item table.
    fn store(&mut self, n: usize) -> Result<u32, String> {
        let floor = self.marks.last().copied().unwrap_or(0);
        let from =
            self.stack.len().checked_sub(n).filter(|from| *from >= floor).ok_or("the stack is empty")?;
        if n == 0 {
            return Ok(NOWHERE);
        }
        let start = self.out.items.len();
        for i in from..self.stack.len() {
            self.out.items.push(self.stack[i]);
        }
        self.stack.truncate(from);
        let run = self.out.runs.push(Run { start, len: n as u32, next: NOWHERE });
        self.charge()?;
        Ok(run)
    }

    /// Values above the last mark, which goes.
    fn marked(&mut self) -> Result<usize, String> {
        let height = self.marks.pop().ok_or("there is no mark")?;
        Ok(self.stack.len() - height)
    }

    fn push(&mut self, value: Value) -> Result<(), String> {
        if self.stack.len() >= MAX_STACK {
            return Err(format!("more than {MAX_STACK} values wait"));
        }
        self.stack.push(value);
        Ok(())
    }

    fn pop(&mut self) -> Result<Value, String> {
        let floor = self.marks.last().copied().unwrap_or(0);
        if self.stack.len() <= floor {
            return Err("the stack is empty".into());
        }
        self.stack.pop().ok_or_else(|| "the stack is empty".into())
    }

    fn charge(&self) -> Result<(), String> {
        let out = &self.out;
        let taken = out.nodes.bytes() + out.runs.bytes() + out.items.bytes() + self.memo.bytes();
        let limit = TABLE_BYTES_PER_BYTE * out.bytes.len() + FREE_TABLE_BYTES;
        if taken > limit { Err("more objects than such a file has".into()) } else { Ok(()) }
    }

    fn take(&mut self, n: usize) -> Result<&'a [u8], String> {
        let end = self.at.checked_add(n).filter(|end| *end <= self.out.bytes.len()).ok_or("cut short")?;
        let bytes = &self.out.bytes[self.at..end];
        self.at = end;
        Ok(bytes)
    }

    fn line(&mut self) -> Result<&'a str, String> {
        let rest = &self.out.bytes[self.at..];
        let len =
            rest.iter().take(MAX_NAME_BYTES).position(|b| *b == b'\n').ok_or("a name without an end")?;
        let line = std::str::from_utf8(&rest[..len]).map_err(|_| "a name that is not UTF-8")?;
        self.at += len + 1;
        Ok(line)
    }
}
