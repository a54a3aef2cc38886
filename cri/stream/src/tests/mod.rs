//! Sessions over real sockets, with a client of our own and real processes.
