//! `guest doctor`: what the host of the guest manager is, what it offers, what is missing, and how to get it.

use anyhow::Result;
use sepal_schema::{
    node_capnp::node_info::{self, finding::Severity},
    transport::Handle,
};
use serde::Serialize;

use crate::{
    args::Doctor,
    devices::fit,
    manager::Manager,
    place::{Otherwise, Place},
    show, status, table,
};

/// What the doctor found, as JSON; the names are the protocol's.
#[derive(Default, Serialize)]
#[serde(rename_all = "camelCase")]
struct Report {
    /// None if no guest manager could say.
    node: Option<Node>,
    findings: Vec<Finding>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Node {
    host_name: String,
    kernel: String,
    version: String,
    cpu_model: String,
    cpus: u32,
    usable_cpus: u32,
    sockets: u32,
    cores_per_socket: u32,
    threads_per_core: u32,
    mhz: u32,
    memory_bytes: u64,
    free_bytes: u64,
    available_bytes: u64,
    cells: Vec<Cell>,
    kvm: Kvm,
    layers: Vec<Layer>,
    capacity: Capacity,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Cell {
    id: u32,
    memory_bytes: u64,
    free_bytes: u64,
    cpus: Vec<u16>,
    distances: Vec<u16>,
    huge_pages: Vec<HugePages>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct HugePages {
    size_bytes: u64,
    total: u64,
    free: u64,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Kvm {
    usable: bool,
    detail: String,
    api_version: u32,
    hardware: bool,
    max_vcpus: u32,
    capabilities: Vec<Capability>,
}

#[derive(Serialize)]
struct Capability {
    name: String,
    value: i32,
    needed: bool,
}

#[derive(Serialize)]
struct Layer {
    name: String,
    offered: bool,
    detail: String,
    remedy: String,
}

/// Of what has no limit, the protocol's largest number is the most.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Capacity {
    guests: u32,
    max_guests: u32,
    descriptors: u64,
    max_descriptors: u64,
    tasks: u64,
    max_tasks: u64,
    memory_bytes: u64,
    max_memory_bytes: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Finding {
    severity: &'static str,
    about: String,
    what: String,
    remedy: String,
}

const PROBLEM: &str = "problem";
const WARNING: &str = "warning";
const NOTE: &str = "note";

/// Looks at the host, by the guest manager that runs or one that is started for it. The exit status is 1 if there are problems.
pub(crate) async fn doctor(handle: &Handle, place: &Place, args: &Doctor) -> Result<u8> {
    let report = match examine(handle, place).await {
        Ok(report) => report,
        Err(error) => Report {
            node: None,
            findings: vec![Finding {
                severity: PROBLEM,
                about: "manager".into(),
                what: format!("No guest manager can say anything about the host: {error:#}."),
                remedy: "see to that first; `guest-manager` alone says in its log why it does not start".into(),
            }],
        },
    };
    match args.json {
        true => show::print_json(&report)?,
        false => {
            show::print(report.in_words().as_bytes())?;
        }
    }
    let problems = report.findings.iter().any(|finding| finding.severity == PROBLEM);
    Ok(if problems { status::FAILED } else { status::SUCCESS })
}

async fn examine(handle: &Handle, place: &Place) -> Result<Report> {
    let mut manager = Manager::connect(handle, place, otherwise(place))?;
    let own = manager.is_private();
    let answer = manager.client.node_request().send().promise.await;
    let report = match answer {
        Ok(answer) => Report::read(answer.get()?.get_node()?),
        Err(error) => Err(manager.explain(handle, error.into()).await),
    };
    manager.close(handle).await;
    let mut report = report?;
    if own {
        // It ends with this command, and is not meant to keep anything.
        report.findings.retain(|finding| finding.about != "state");
    }
    Ok(report)
}

/// A manager is started at the user's own place only, as by `launch`.
fn otherwise(place: &Place) -> Otherwise {
    match place.address() {
        None => Otherwise::Private,
        Some(_) => Otherwise::Fail,
    }
}

impl Report {
    fn read(from: node_info::Reader<'_>) -> Result<Self> {
        let findings = from.get_findings()?.iter().map(|finding| {
            Ok(Finding {
                severity: match finding.get_severity() {
                    Ok(Severity::Problem) => PROBLEM,
                    Ok(Severity::Note) => NOTE,
                    // One that this version does not know is told all the same.
                    Ok(Severity::Warning) | Err(_) => WARNING,
                },
                about: fit(finding.get_about()?)?,
                what: fit(finding.get_what()?)?,
                remedy: fit(finding.get_remedy()?)?,
            })
        });
        Ok(Self {
            findings: findings.collect::<Result<_>>()?,
            node: Some(Node::read(from)?),
        })
    }

    fn in_words(&self) -> String {
        let mut text = self.node.as_ref().map_or_else(String::new, Node::in_words);
        for finding in &self.findings {
            if !text.is_empty() {
                text.push('\n');
            }
            text.push_str(&table::facts(&[
                (finding.severity, finding.what.clone()),
                ("do", finding.remedy.clone()),
            ]));
        }
        if !text.is_empty() {
            text.push('\n');
        }
        text.push_str(&self.verdict());
        text
    }

    fn verdict(&self) -> String {
        let count = |severity| {
            self.findings
                .iter()
                .filter(|finding| finding.severity == severity)
                .count()
        };
        let (problems, warnings) = (count(PROBLEM), count(WARNING));
        let plural = |count: usize, what: &str| match count {
            1 => format!("1 {what}"),
            count => format!("{count} {what}s"),
        };
        match (problems, warnings) {
            (0, 0) => "Guests can be started.\n".to_owned(),
            (0, warnings) => format!("Guests can be started, with {}.\n", plural(warnings, WARNING)),
            (problems, 0) => format!("{}.\n", plural(problems, PROBLEM)),
            (problems, warnings) => format!("{}, {}.\n", plural(problems, PROBLEM), plural(warnings, WARNING)),
        }
    }
}

impl Node {
    fn read(from: node_info::Reader<'_>) -> Result<Self> {
        let kvm = from.get_kvm()?;
        let capacity = from.get_capacity()?;
        Ok(Self {
            host_name: fit(from.get_host_name()?)?,
            kernel: fit(from.get_kernel()?)?,
            version: fit(from.get_version()?)?,
            cpu_model: fit(from.get_cpu_model()?)?,
            cpus: from.get_cpus(),
            usable_cpus: from.get_usable_cpus(),
            sockets: from.get_sockets(),
            cores_per_socket: from.get_cores_per_socket(),
            threads_per_core: from.get_threads_per_core(),
            mhz: from.get_mhz(),
            memory_bytes: from.get_memory_bytes(),
            free_bytes: from.get_free_bytes(),
            available_bytes: from.get_available_bytes(),
            cells: from.get_cells()?.iter().map(Cell::read).collect::<Result<_>>()?,
            kvm: Kvm {
                usable: kvm.get_usable(),
                detail: fit(kvm.get_detail()?)?,
                api_version: kvm.get_api_version(),
                hardware: kvm.get_hardware(),
                max_vcpus: kvm.get_max_vcpus(),
                capabilities: kvm
                    .get_capabilities()?
                    .iter()
                    .map(|capability| {
                        Ok(Capability {
                            name: fit(capability.get_name()?)?,
                            value: capability.get_value(),
                            needed: capability.get_needed(),
                        })
                    })
                    .collect::<Result<_>>()?,
            },
            layers: from
                .get_layers()?
                .iter()
                .map(|layer| {
                    Ok(Layer {
                        name: fit(layer.get_name()?)?,
                        offered: layer.get_offered(),
                        detail: fit(layer.get_detail()?)?,
                        remedy: fit(layer.get_remedy()?)?,
                    })
                })
                .collect::<Result<_>>()?,
            capacity: Capacity {
                guests: capacity.get_guests(),
                max_guests: capacity.get_max_guests(),
                descriptors: capacity.get_descriptors(),
                max_descriptors: capacity.get_max_descriptors(),
                tasks: capacity.get_tasks(),
                max_tasks: capacity.get_max_tasks(),
                memory_bytes: capacity.get_memory_bytes(),
                max_memory_bytes: capacity.get_max_memory_bytes(),
            },
        })
    }

    fn in_words(&self) -> String {
        let size = table::short;
        let mut processors = format!("{}, {} of them usable", self.cpus, self.usable_cpus);
        if !self.cpu_model.is_empty() {
            processors.push_str(&format!("; {}", self.cpu_model));
        }
        if self.mhz > 0 {
            processors.push_str(&format!(", {} MHz", self.mhz));
        }
        let layout = format!(
            "sockets: {}, cores of each: {}, threads of each: {}",
            self.sockets, self.cores_per_socket, self.threads_per_core
        );
        let memory = format!(
            "{}, {} available, {} unused",
            size(self.memory_bytes),
            size(self.available_bytes),
            size(self.free_bytes)
        );
        let kvm = match (&self.kvm, self.kvm.hardware) {
            (kvm, _) if !kvm.usable => format!("cannot be used: {}", kvm.detail),
            (kvm, true) => format!("usable, at most {} vCPUs", kvm.max_vcpus),
            (kvm, false) => format!(
                "usable, without hardware virtualization, at most {} vCPUs",
                kvm.max_vcpus
            ),
        };
        let mut text = table::facts(&[
            ("host", format!("{}, Linux {}", self.host_name, self.kernel)),
            ("manager", self.version.clone()),
            ("processors", processors),
            ("", layout),
            ("memory", memory),
            ("KVM", kvm),
            ("guests", self.capacity.in_words()),
        ]);
        text.push_str("\nmemory cells\n");
        let cells = self.cells.iter().map(Cell::row);
        text.push_str(&table::table(
            &["  CELL", "MEMORY", "UNUSED", "CPUS", "DISTANCES", "HUGE PAGES"],
            cells,
        ));
        text.push_str("\njail\n");
        let layers = self.layers.iter().map(|layer| {
            [
                format!("  {}", layer.name),
                if layer.offered { "offered" } else { "missing" }.to_owned(),
                layer.detail.clone(),
            ]
        });
        text.push_str(&table::table(&["  LAYER", "STATE", "DETAIL"], layers));
        text
    }
}

impl Cell {
    fn read(from: node_info::cell::Reader<'_>) -> Result<Self> {
        let pages = from.get_huge_pages()?.iter().map(|pages| HugePages {
            size_bytes: pages.get_size_bytes(),
            total: pages.get_total(),
            free: pages.get_free(),
        });
        Ok(Self {
            id: from.get_id(),
            memory_bytes: from.get_memory_bytes(),
            free_bytes: from.get_free_bytes(),
            cpus: from.get_cpus()?.iter().collect(),
            distances: from.get_distances()?.iter().collect(),
            huge_pages: pages.collect(),
        })
    }

    fn row(&self) -> [String; 6] {
        let distances: Vec<_> = self.distances.iter().map(ToString::to_string).collect();
        let there = self.huge_pages.iter().filter(|pages| pages.total > 0);
        let pages: Vec<_> = there
            .map(|pages| {
                format!(
                    "{} of {} x {} free",
                    pages.free,
                    pages.total,
                    table::short(pages.size_bytes)
                )
            })
            .collect();
        [
            format!("  {}", self.id),
            table::short(self.memory_bytes),
            table::short(self.free_bytes),
            ranges(&self.cpus),
            distances.join(" "),
            if pages.is_empty() { "-".into() } else { pages.join(", ") },
        ]
    }
}

impl Capacity {
    fn in_words(&self) -> String {
        let of = |used: u64, most: u64, what: &str| match most {
            u64::MAX => format!("{used} {what}"),
            most => format!("{used} of {most} {what}"),
        };
        let promised = match self.max_memory_bytes {
            0 => format!("{} promised", table::short(self.memory_bytes)),
            most => format!("{} of {} promised", table::short(self.memory_bytes), table::short(most)),
        };
        let guests = match self.max_guests {
            u32::MAX => self.guests.to_string(),
            most => format!("{} of {most}", self.guests),
        };
        let descriptors = of(self.descriptors, self.max_descriptors, "descriptors");
        let tasks = of(self.tasks, self.max_tasks, "tasks");
        format!("{guests}; {promised}; {descriptors}; {tasks}")
    }
}

/// Numbers as the kernel lists them: `0-3,8`.
fn ranges(numbers: &[u16]) -> String {
    let mut runs: Vec<(u16, u16)> = Vec::new();
    for &number in numbers {
        match runs.last_mut() {
            Some((_, last)) if last.checked_add(1) == Some(number) => *last = number,
            _ => runs.push((number, number)),
        }
    }
    let runs = runs.into_iter().map(|(first, last)| match first == last {
        true => first.to_string(),
        false => format!("{first}-{last}"),
    });
    runs.collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn finding(severity: &'static str) -> Finding {
        Finding {
            severity,
            about: "kvm".into(),
            what: "No guest can be started.".into(),
            remedy: "load it".into(),
        }
    }

    fn with(severities: &[&'static str]) -> Report {
        Report {
            node: None,
            findings: severities.iter().map(|severity| finding(severity)).collect(),
        }
    }

    #[test]
    fn processors_are_listed_as_ranges() {
        assert_eq!(ranges(&[0, 1, 2, 3, 8, 10, 11]), "0-3,8,10-11");
        assert_eq!(ranges(&[]), "");
        assert_eq!(ranges(&[u16::MAX]), "65535");
    }

    #[test]
    fn the_verdict_counts_what_matters() {
        assert_eq!(with(&[]).in_words(), "Guests can be started.\n");
        assert_eq!(with(&[NOTE]).verdict(), "Guests can be started.\n");
        assert_eq!(
            with(&[WARNING, NOTE]).verdict(),
            "Guests can be started, with 1 warning.\n"
        );
        assert_eq!(with(&[PROBLEM, WARNING, WARNING]).verdict(), "1 problem, 2 warnings.\n");
        let words = with(&[PROBLEM]).in_words();
        assert!(
            words.contains("problem  No guest can be started.") && words.contains("do       load it"),
            "{words}"
        );
    }

    #[test]
    fn a_report_is_read_and_told_within_a_terminal() {
        let mut message = capnp::message::TypedBuilder::<node_info::Owned>::new_default();
        let mut to = message.init_root();
        to.set_host_name("vm-1");
        to.set_cpus(4);
        to.set_usable_cpus(2);
        let mut cells = to.reborrow().init_cells(1);
        let mut cell = cells.reborrow().get(0);
        cell.set_memory_bytes(8 << 30);
        cell.reborrow().init_cpus(2).set(1, 1);
        let mut pages = cell.init_huge_pages(1).get(0);
        pages.set_size_bytes(2 << 20);
        pages.set_total(8);
        let mut layers = to.reborrow().init_layers(1);
        layers.reborrow().get(0).set_name("landlock");
        let mut capacity = to.reborrow().init_capacity();
        capacity.set_max_descriptors(u64::MAX);
        capacity.set_max_guests(256);
        to.init_findings(1).get(0).set_what("It is slow.\u{1b}[2J");
        let report = Report::read(message.get_root_as_reader().unwrap()).unwrap();
        let words = report.in_words();
        for part in [
            "vm-1",
            "4, 2 of them usable",
            "0-1",
            "0 of 8 x",
            "landlock",
            "missing",
            "0 of 256",
            "0 descriptors",
        ] {
            assert!(words.contains(part), "{part}: {words}");
        }
        assert!(
            words.lines().all(|line| line.chars().count() <= 80) && !words.contains('\u{1b}'),
            "{words}"
        );
        serde_json::to_string(&report).unwrap();
    }
}
