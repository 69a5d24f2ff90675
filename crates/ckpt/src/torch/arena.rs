/// Elements of a block.
const BLOCK: usize = 1024;

/// A list that grows without moving: what it takes is what it holds, and at most a block more.
#[derive(Debug)]
pub(crate) struct Arena<T> {
    blocks: Vec<Vec<T>>,
    len: u32,
}

impl<T> Default for Arena<T> {
    fn default() -> Self {
        Arena { blocks: Vec::new(), len: 0 }
    }
}

impl<T: Copy> Arena<T> {
    pub(crate) fn len(&self) -> u32 {
        self.len
    }

    /// Bytes of all blocks.
    pub(crate) fn bytes(&self) -> usize {
        self.blocks.len() * (BLOCK * size_of::<T>() + 2 * size_of::<Vec<T>>())
    }

    /// Appends an element and gives its index.
    pub(crate) fn push(&mut self, value: T) -> u32 {
        let index = self.len;
        if (index as usize).is_multiple_of(BLOCK) {
            self.blocks.push(Vec::with_capacity(BLOCK));
        }
        self.blocks[index as usize / BLOCK].push(value);
        self.len += 1;
        index
    }

    pub(crate) fn get(&self, index: u32) -> T {
        self.blocks[index as usize / BLOCK][index as usize % BLOCK]
    }

    pub(crate) fn set(&mut self, index: u32, value: T) {
        self.blocks[index as usize / BLOCK][index as usize % BLOCK] = value;
    }
}
