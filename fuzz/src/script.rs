//! An input read as a script: numbers and bytes, front to back. Beyond its end there are zeros, so that every prefix of
//! a script is one too.

/// What is left of an input.
pub(crate) struct Script<'a>(&'a [u8]);

impl<'a> Script<'a> {
    pub(crate) fn new(data: &'a [u8]) -> Self {
        Self(data)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn rest(&self) -> &'a [u8] {
        self.0
    }

    /// At most `len` bytes.
    pub(crate) fn bytes(&mut self, len: usize) -> &'a [u8] {
        let (bytes, rest) = self.0.split_at(len.min(self.0.len()));
        self.0 = rest;
        bytes
    }

    fn chunk<const LEN: usize>(&mut self) -> [u8; LEN] {
        let mut chunk = [0; LEN];
        let bytes = self.bytes(LEN);
        chunk[..bytes.len()].copy_from_slice(bytes);
        chunk
    }

    pub(crate) fn u8(&mut self) -> u8 {
        self.chunk::<1>()[0]
    }

    pub(crate) fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.chunk())
    }

    pub(crate) fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.chunk())
    }

    pub(crate) fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.chunk())
    }

    pub(crate) fn bool(&mut self) -> bool {
        self.u8() & 1 == 1
    }

    /// A number below `limit`, which is at most 256.
    pub(crate) fn below(&mut self, limit: usize) -> usize {
        usize::from(self.u8()) % limit
    }
}
