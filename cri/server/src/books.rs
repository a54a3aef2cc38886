//! The database as the image store and the address pool see it.

use std::io;
use std::net::Ipv4Addr;

use coracle_image::{Change, Pending, Records};
use coracle_network::{AddressBook, BookError, Row};
use coracle_store::{Op, Record, Store, Table, boot_id};
use tracing::warn;

/// Rows of images.
pub(crate) struct ImageRows(pub(crate) Store);

/// Leases of pod addresses.
pub(crate) struct AddressRows(pub(crate) Store);

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

impl AddressBook for AddressRows {
    fn load(&self) -> Result<Vec<Row>, BookError> {
        let loaded = self.0.load::<Ipv4Addr>(Table::Addresses)?;
        for bad in &loaded.bad {
            warn!(pod = bad.key, error = %bad.error, "an address's record cannot be read and was set aside");
        }
        Ok(loaded
            .rows
            .into_iter()
            .map(|(pod, record)| Row {
                pod,
                address: record.body,
            })
            .collect())
    }

    fn save(&self, row: &Row) -> Result<(), BookError> {
        let record = Record {
            boot: boot_id()?,
            body: row.address,
            request: Vec::new(),
        };
        let op = Op::Put {
            table: Table::Addresses,
            key: row.pod.clone(),
            value: record.encode(),
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
