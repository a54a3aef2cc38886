//! A heap for small programs of one thread that live for milliseconds, or for ever in little memory.
//!
//! The C library's heap maps and unmaps a page or two at a time: a hundred system calls and as many page faults to read
//! one configuration, which is more than all the rest of a container's start. This one takes memory in larger pieces
//! that the kernel fills at once, hands it out in size classes, and keeps what is given back for the next of its class.

use std::alloc::{GlobalAlloc, Layout};
use std::cell::UnsafeCell;
use std::ptr::{self, NonNull, null_mut};
use std::sync::atomic::{AtomicBool, Ordering};

/// The heap, for `#[global_allocator]`.
#[derive(Debug)]
pub struct Heap {
    locked: AtomicBool,
    state: UnsafeCell<State>,
}

/// Classes up to this size are 16 bytes apart, the ones above double.
const FINE: usize = 512;
/// Above this a block has a mapping of its own, which goes back to the kernel.
const LARGE: usize = 32 << 10;
/// Fine classes, then 1 KiB to 32 KiB.
const CLASSES: usize = FINE / 16 + 6;
/// What is taken from the kernel at a time. All of it is touched at once, so it is what a program costs at least.
const PIECE: usize = 64 << 10;
/// Every block has at least this alignment.
const ALIGN: usize = 16;
const PAGE: usize = 4096;

#[derive(Debug)]
struct State {
    /// Given back blocks of each class, linked through their first word.
    free: [*mut u8; CLASSES],
    /// What is left of the last piece.
    next: *mut u8,
    left: usize,
}

impl Heap {
    /// An empty heap; it takes nothing before the first block is asked for.
    #[must_use]
    pub const fn new() -> Heap {
        let state = State {
            free: [null_mut(); CLASSES],
            next: null_mut(),
            left: 0,
        };
        Heap {
            locked: AtomicBool::new(false),
            state: UnsafeCell::new(state),
        }
    }

    /// Runs `f` on the state, alone.
    fn with<T>(&self, f: impl FnOnce(&mut State) -> T) -> T {
        // Of one thread nobody ever waits here; a second one would do so for a few instructions.
        while self
            .locked
            .compare_exchange_weak(false, true, Ordering::Acquire, Ordering::Relaxed)
            .is_err()
        {
            std::hint::spin_loop();
        }
        // SAFETY: `locked` was false and is ours now, so nobody else has a reference until it is false again; `f` is
        // one of the functions below, which never come back here.
        let result = f(unsafe { &mut *self.state.get() });
        self.locked.store(false, Ordering::Release);
        result
    }
}

impl Default for Heap {
    fn default() -> Heap {
        Heap::new()
    }
}

// SAFETY: the state is reached through `with` alone, which lets one thread in at a time; the blocks that its pointers
// lead to belong to nobody else.
unsafe impl Sync for Heap {}

// SAFETY: blocks come from pieces or mappings of the kernel, do not overlap, are as large and as aligned as asked, and
// stay where they are until they are given back with the same layout.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        match class(layout) {
            Some(class) => self.with(|state| state.take(class)),
            None if layout.align() > PAGE => null_mut(),
            None => map(round_to_pages(layout.size()), false),
        }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the same contract as ours.
        let block = unsafe { self.alloc(layout) };
        if !block.is_null() && class(layout).is_some() {
            // A fresh mapping is zero already, a block of a class may have been used.
            // SAFETY: the block has at least that many bytes.
            unsafe { ptr::write_bytes(block, 0, layout.size()) };
        }
        block
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        match class(layout) {
            Some(class) => self.with(|state| state.give_back(block, class)),
            None => {
                // SAFETY: the block is a whole mapping that `alloc` made for this layout.
                unsafe { libc::munmap(block.cast(), round_to_pages(layout.size())) };
            }
        }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        let Ok(new) = Layout::from_size_align(size, layout.align()) else {
            return null_mut();
        };
        match (class(layout), class(new)) {
            // It has room for that already.
            (Some(old), Some(new)) if old == new => return block,
            (Some(old), Some(new)) if self.with(|state| state.grow_in_place(block, old, new)) => {
                return block;
            }
            (None, None) => {
                let (old, new) = (round_to_pages(layout.size()), round_to_pages(size));
                // SAFETY: the block is a whole mapping of ours; the kernel may move it.
                let moved = unsafe { libc::mremap(block.cast(), old, new, libc::MREMAP_MAYMOVE) };
                return if moved == libc::MAP_FAILED {
                    null_mut()
                } else {
                    moved.cast()
                };
            }
            _ => {}
        }
        // SAFETY: `new` has a size that is not zero, as the caller of realloc promises.
        let larger = unsafe { self.alloc(new) };
        if !larger.is_null() {
            // SAFETY: both blocks have that many bytes, and a new one does not overlap one in use.
            unsafe { ptr::copy_nonoverlapping(block, larger, layout.size().min(size)) };
            // SAFETY: the caller gives the old block up with the layout that it has.
            unsafe { self.dealloc(block, layout) };
        }
        larger
    }
}

impl State {
    fn take(&mut self, class: usize) -> *mut u8 {
        if let Some(first) = NonNull::new(self.free[class]) {
            // SAFETY: a block in the list holds the link to the next in its first word.
            self.free[class] = unsafe { first.cast::<*mut u8>().read() };
            return first.as_ptr();
        }
        let size = size_of_class(class);
        if self.left < size {
            // What is left of the old piece is smaller than one block of a class and is given up.
            let piece = map(PIECE, true);
            if piece.is_null() {
                return null_mut();
            }
            self.next = piece;
            self.left = PIECE;
        }
        let block = self.next;
        // SAFETY: `size` bytes are left in the piece.
        self.next = unsafe { block.add(size) };
        self.left -= size;
        block
    }

    fn give_back(&mut self, block: *mut u8, class: usize) {
        let size = size_of_class(class);
        // The last one given out shrinks the piece again: parsers grow and drop one buffer after the other.
        if block.wrapping_add(size) == self.next {
            self.next = block;
            self.left += size;
            return;
        }
        // SAFETY: a block has room for a word, is aligned for it, and belongs to the heap again.
        unsafe { block.cast::<*mut u8>().write(self.free[class]) };
        self.free[class] = block;
    }

    /// The last one given out grows into the rest of its piece.
    fn grow_in_place(&mut self, block: *mut u8, old: usize, new: usize) -> bool {
        let (old, new) = (size_of_class(old), size_of_class(new));
        if new < old || block.wrapping_add(old) != self.next || self.left < new - old {
            return false;
        }
        self.next = block.wrapping_add(new);
        self.left -= new - old;
        true
    }
}

/// The class of a layout; none where it gets a mapping of its own.
fn class(layout: Layout) -> Option<usize> {
    let size = layout.size().max(1);
    if layout.align() > ALIGN || size > LARGE {
        return None;
    }
    if size <= FINE {
        return Some((size - 1) / 16);
    }
    // 513 to 1024 is the first class above the fine ones.
    let doublings = (size - 1).ilog2() - FINE.ilog2();
    Some(FINE / 16 + doublings as usize)
}

fn size_of_class(class: usize) -> usize {
    match class.checked_sub(FINE / 16) {
        None => (class + 1) * 16,
        Some(coarse) => FINE << (coarse + 1),
    }
}

fn round_to_pages(size: usize) -> usize {
    size.div_ceil(PAGE) * PAGE
}

/// Fresh memory, zero; with `filled` every page is there at once.
fn map(size: usize, filled: bool) -> *mut u8 {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | if filled { libc::MAP_POPULATE } else { 0 };
    // SAFETY: a new mapping where the kernel has room replaces nothing.
    let mapped = unsafe { libc::mmap(null_mut(), size, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
    if mapped == libc::MAP_FAILED {
        null_mut()
    } else {
        mapped.cast()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(size: usize) -> Layout {
        Layout::from_size_align(size, 8).unwrap()
    }

    #[test]
    fn every_size_fits_its_class_and_no_smaller_one() {
        for size in 1..=LARGE {
            let class = class(layout(size)).unwrap();
            assert!(class < CLASSES && size_of_class(class) >= size, "{size}");
            assert!(class == 0 || size_of_class(class - 1) < size, "{size}");
        }
        assert_eq!(class(layout(LARGE + 1)), None);
        assert_eq!(class(Layout::from_size_align(8, 64).unwrap()), None);
        assert_eq!(size_of_class(CLASSES - 1), LARGE);
    }

    #[test]
    fn blocks_keep_their_bytes_whatever_happens_to_others() {
        let heap = Heap::new();
        let mut blocks: Vec<(*mut u8, usize, u8)> = Vec::new();
        let mut random = 12345u64;
        for round in 0..20_000u32 {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let pick = (random >> 33) as usize;
            let size = 1 + pick % [40, 700, 5000, 50_000][pick % 4];
            let fill = (round % 251) as u8;
            let check = |block: *mut u8, size: usize, fill: u8| {
                // SAFETY: the block has that many bytes, all written before.
                let bytes = unsafe { std::slice::from_raw_parts(block, size) };
                assert!(bytes.iter().all(|byte| *byte == fill));
            };
            match pick % 3 {
                0 if !blocks.is_empty() => {
                    let (block, size, fill) = blocks.swap_remove(pick % blocks.len());
                    check(block, size, fill);
                    // SAFETY: it came from this heap with this layout.
                    unsafe { heap.dealloc(block, layout(size)) };
                }
                1 if !blocks.is_empty() => {
                    let index = pick % blocks.len();
                    let (block, old, before) = blocks[index];
                    // SAFETY: as above, and the size is not zero.
                    let block = unsafe { heap.realloc(block, layout(old), size) };
                    check(block, old.min(size), before);
                    // SAFETY: it has that many bytes now.
                    unsafe { ptr::write_bytes(block, fill, size) };
                    blocks[index] = (block, size, fill);
                }
                _ => {
                    // SAFETY: the size is not zero.
                    let block = unsafe { heap.alloc_zeroed(layout(size)) };
                    assert_eq!(block as usize % ALIGN, 0);
                    check(block, size, 0);
                    // SAFETY: it has that many bytes.
                    unsafe { ptr::write_bytes(block, fill, size) };
                    blocks.push((block, size, fill));
                }
            }
        }
    }
}
