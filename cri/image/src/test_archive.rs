//! Archives for tests, block by block, so that any of them can be wrong.

/// An archive under construction.
#[derive(Clone, Default)]
pub(crate) struct Archive(pub(crate) Vec<u8>);

/// A ustar header whose fields can be changed before it is sealed.
#[derive(Clone)]
pub(crate) struct Header(pub(crate) [u8; 512]);

impl Header {
    pub(crate) fn new(flag: u8, name: &[u8]) -> Header {
        let mut header = Header([0; 512]);
        header.put(0, name);
        header
            .octal(100, 8, 0o644)
            .octal(108, 8, 0)
            .octal(116, 8, 0)
            .octal(124, 12, 0)
            .octal(136, 12, 1000);
        header.0[156] = flag;
        header.put(257, b"ustar\x0000");
        header
    }

    pub(crate) fn put(&mut self, at: usize, bytes: &[u8]) -> &mut Header {
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
        self
    }

    pub(crate) fn octal(&mut self, at: usize, length: usize, value: u64) -> &mut Header {
        let digits = length - 1;
        self.put(at, format!("{value:0digits$o}\0").as_bytes())
    }

    pub(crate) fn size(&mut self, size: u64) -> &mut Header {
        self.octal(124, 12, size)
    }

    pub(crate) fn mode(&mut self, mode: u64) -> &mut Header {
        self.octal(100, 8, mode)
    }

    pub(crate) fn owner(&mut self, uid: u64, gid: u64) -> &mut Header {
        self.octal(108, 8, uid).octal(116, 8, gid)
    }

    pub(crate) fn link(&mut self, target: &[u8]) -> &mut Header {
        self.put(157, target)
    }

    pub(crate) fn sealed(&self) -> [u8; 512] {
        let mut block = self.0;
        block[148..156].fill(b' ');
        let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        block
    }
}

impl Archive {
    pub(crate) fn new() -> Archive {
        Archive::default()
    }

    pub(crate) fn block(mut self, block: [u8; 512]) -> Archive {
        self.0.extend_from_slice(&block);
        self
    }

    pub(crate) fn header(self, header: &Header) -> Archive {
        let sealed = header.sealed();
        self.block(sealed)
    }

    pub(crate) fn data(mut self, data: &[u8]) -> Archive {
        self.0.extend_from_slice(data);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    pub(crate) fn entry(self, header: &Header, data: &[u8]) -> Archive {
        let mut header = header.clone();
        header.size(data.len() as u64);
        self.header(&header).data(data)
    }

    pub(crate) fn file(self, name: &str, data: &[u8]) -> Archive {
        self.entry(&Header::new(b'0', name.as_bytes()), data)
    }

    pub(crate) fn dir(self, name: &str) -> Archive {
        let mut header = Header::new(b'5', name.as_bytes());
        self.header(header.mode(0o755))
    }

    pub(crate) fn symlink(self, name: &str, target: &str) -> Archive {
        let mut header = Header::new(b'2', name.as_bytes());
        self.header(header.mode(0o777).link(target.as_bytes()))
    }

    pub(crate) fn hard_link(self, name: &str, target: &str) -> Archive {
        let mut header = Header::new(b'1', name.as_bytes());
        self.header(header.link(target.as_bytes()))
    }

    pub(crate) fn pax(self, records: &[(&str, &str)]) -> Archive {
        let text: Vec<u8> = records
            .iter()
            .flat_map(|(key, value)| record(key, value))
            .collect();
        self.entry(&Header::new(b'x', b"PaxHeaders/x"), &text)
    }

    pub(crate) fn end(self) -> Vec<u8> {
        self.block([0; 512]).block([0; 512]).0
    }
}

/// One PAX record with its right length.
pub(crate) fn record(key: &str, value: &str) -> Vec<u8> {
    let rest = key.len() + value.len() + 3;
    let length = (rest..)
        .find(|length| rest + length.to_string().len() == *length)
        .unwrap_or_default();
    format!("{length} {key}={value}\n").into_bytes()
}
