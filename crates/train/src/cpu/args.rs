//! The operands of a launch as slices of the arena.

use std::marker::PhantomData;
use std::ops::Range;

use bytemuck::Pod;
use kernels::Acc;

use crate::arena::Arena;
use crate::launch::{Gradient, Launch, Operand};

/// What a kernel of element type `T` is called with.
///
/// Inputs and outputs of a launch are disjoint unless the op is in place: values that are alive at the same op never
/// share bytes. One launch runs at a time, and messages under way keep to buffers that no launch touches meanwhile.
pub(super) struct Args<'a, T> {
    arena: &'a Arena,
    launch: Launch<'a>,
    of: PhantomData<T>,
}

impl<'a, T: Pod> Args<'a, T> {
    pub(super) fn new(arena: &'a Arena, launch: Launch<'a>) -> Args<'a, T> {
        Args { arena, launch, of: PhantomData }
    }

    pub(super) fn launch(&self) -> &Launch<'a> {
        &self.launch
    }

    fn read<U: Pod>(&self, of: Operand) -> &'a [U] {
        debug_assert_eq!(of.dtype.bytes(), size_of::<U>());
        // SAFETY: nobody writes an input while the launch runs, see above.
        unsafe { self.arena.slice(of.offset, of.len()) }
    }

    fn write<U: Pod>(&self, of: Operand) -> &'a mut [U] {
        debug_assert_eq!(of.dtype.bytes(), size_of::<U>());
        // SAFETY: the launch alone has its outputs, see above, and takes each of them once.
        unsafe { self.arena.slice_mut(of.offset, of.len()) }
    }

    pub(super) fn input(&self, i: usize) -> &'a [T] {
        self.read(self.launch.input(i))
    }

    pub(super) fn optional(&self, i: usize) -> Option<&'a [T]> {
        (i < self.launch.inputs()).then(|| self.input(i))
    }

    pub(super) fn floats(&self, i: usize) -> &'a [f32] {
        self.read(self.launch.input(i))
    }

    pub(super) fn doubles(&self, i: usize) -> &'a [f64] {
        self.read(self.launch.input(i))
    }

    pub(super) fn ids(&self, i: usize) -> &'a [u32] {
        self.read(self.launch.input(i))
    }

    pub(super) fn out(&self, i: usize) -> &'a mut [T] {
        self.write(self.launch.output(i))
    }

    pub(super) fn out_floats(&self, i: usize) -> &'a mut [f32] {
        self.write(self.launch.output(i))
    }

    /// These rows of output `i`, which no other task of the launch takes.
    pub(super) fn out_rows(&self, i: usize, rows: Range<usize>) -> &'a mut [f32] {
        let out = self.launch.output(i);
        self.write(out.part(rows.start * out.cols, rows.len() * out.cols))
    }

    pub(super) fn out_ids(&self, i: usize) -> &'a mut [u32] {
        self.write(self.launch.output(i))
    }

    pub(super) fn out_doubles(&self, i: usize) -> &'a mut [f64] {
        self.write(self.launch.output(i))
    }

    /// Rows and columns of input `i`.
    pub(super) fn shape(&self, i: usize) -> (usize, usize) {
        let of = self.launch.input(i);
        (of.rows, of.cols)
    }

    /// What an accumulating op adds to, and whether that lies in the output's own bytes.
    pub(super) fn acc(&self) -> Acc<'a, T> {
        match self.launch.acc() {
            None => Acc::None,
            Some(acc) if acc.offset == self.launch.output(0).offset => Acc::InPlace,
            Some(acc) => Acc::From(self.read(acc)),
        }
    }

    /// The levels of gradient `i`, and how the result joins them.
    pub(super) fn gradient(&self, i: usize) -> (&'a mut [f32], Gradient<'a>) {
        let gradient = self.launch.gradient(i);
        (self.write(gradient.levels), gradient)
    }

    pub(super) fn workspace(&self) -> &'a mut [f32] {
        self.write(self.launch.workspace())
    }
}
