//! The database as the image store and the pods' networks see it.

use std::io;
use std::net::Ipv4Addr;

use coracle_image::{Change, Pending, Records};
use coracle_network::{Book, BookError, BridgeLease, Row, Wiring};
use coracle_store::{Op, Record, Store, Table, boot_id};
use serde::Deserialize;
use tracing::warn;

/// Rows of images.
pub(crate) struct ImageRows(pub(crate) Store);

/// Rows of pods' networks.
pub(crate) struct NetworkRows(pub(crate) Store);

/// A network's row as this release writes it, or as the first one did.
#[derive(Deserialize)]
#[serde(untagged)]
enum StoredWiring {
    Now(Wiring),
    Address(Ipv4Addr),
}

impl Records for ImageRows {
    fn load(&self) -> io::Result<Vec<(String, Vec<u8>)>> {
        let loaded = self
            .0
            .load::<serde_json::Value>(Table::Images)
            .map_err(io::Error::other)?;
        for bad in &loaded.bad {
            warn!(image = bad.key, error = %bad.error, "an image's record cannot be read and was set aside");
        }
        let rows = loaded.rows.into_iter();
        rows.map(|(key, record)| Ok((key, serde_json::to_vec(&record.body)?)))
            .collect()
    }

    fn commit(&self, changes: Vec<Change>) -> Pending<'_, io::Result<()>> {
        Box::pin(async move {
            let boot = boot_id()?;
            let op = |change| {
                Ok(match change {
                    Change::Put { key, value } => {
                        let body: serde_json::Value = serde_json::from_slice(&value)?;
                        let record = Record {
                            boot: boot.clone(),
                            body,
                            request: Vec::new(),
                        };
                        Op::Put {
                            table: Table::Images,
                            key,
                            value: record.encode(),
                            frees: false,
                        }
                    }
                    Change::Delete { key } => Op::Delete {
                        table: Table::Images,
                        key,
                    },
                })
            };
            let ops = changes.into_iter().map(op).collect::<io::Result<Vec<_>>>()?;
            self.0.commit(ops).await.map_err(io::Error::other)
        })
    }
}

impl Book for NetworkRows {
    fn load(&self) -> Result<Vec<Row>, BookError> {
        let loaded = self.0.load::<StoredWiring>(Table::Addresses)?;
        for bad in &loaded.bad {
            warn!(pod = bad.key, error = %bad.error, "a network's record cannot be read and was set aside");
        }
        let wiring = |stored| match stored {
            StoredWiring::Now(wiring) => wiring,
            StoredWiring::Address(address) => Wiring::Bridge(BridgeLease {
                address,
                v6: None,
                ports: Vec::new(),
            }),
        };
        let rows = loaded.rows.into_iter().map(|(pod, record)| Row {
            pod,
            wiring: wiring(record.body),
        });
        Ok(rows.collect())
    }

    fn save(&self, row: &Row) -> Result<(), BookError> {
        let record = Record {
            boot: boot_id()?,
            body: row.wiring.clone(),
            request: Vec::new(),
        };
        let op = Op::Put {
            table: Table::Addresses,
            key: row.pod.clone(),
            value: record.encode(),
            frees: false,
        };
        Ok(self.0.commit_blocking(vec![op])?)
    }

    fn delete(&self, pod: &str) -> Result<(), BookError> {
        Ok(self.0.commit_blocking(vec![Op::Delete {
            table: Table::Addresses,
            key: pod.to_owned(),
        }])?)
    }
}
