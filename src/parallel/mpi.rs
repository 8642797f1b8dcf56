//! MPI, opened when it is asked for: no build depends on one, and Open MPI, MPICH and Intel MPI will do.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::mem::transmute;
use std::ptr::null_mut;

use super::{Group, refuse};
use crate::error::Result;

/// The processes that `mpirun` or `srun` started.
#[derive(Debug)]
pub struct Mpi {
    calls: Calls,
    handles: Handles,
    rank: usize,
    size: usize,
}

/// What MPI calls a communicator, a datatype, an operation: an address in Open MPI, in MPICH an int, passed alike.
type Handle = usize;

#[derive(Debug, Clone, Copy)]
struct Handles {
    world: Handle,
    float: Handle,
    sum: Handle,
    in_place: usize,
}

/// Those of MPICH, whose binary interface Intel MPI and others share (MPICH ABI Compatibility Initiative).
const MPICH: Handles = Handles {
    world: 0x4400_0000,
    float: 0x4c00_040a,
    sum: 0x5800_0003,
    in_place: usize::MAX,
};

type Init = unsafe extern "C" fn(*mut c_int, *mut c_void, c_int, *mut c_int) -> c_int;
type Ask = unsafe extern "C" fn(Handle, *mut c_int) -> c_int;
type Reduce =
    unsafe extern "C" fn(*const c_void, *mut c_void, c_int, Handle, Handle, c_int, Handle) -> c_int;
type Broadcast = unsafe extern "C" fn(*mut c_void, c_int, Handle, c_int, Handle) -> c_int;
type Finalize = unsafe extern "C" fn() -> c_int;

#[derive(Debug, Clone, Copy)]
struct Calls {
    init: Init,
    rank: Ask,
    size: Ask,
    reduce: Reduce,
    broadcast: Broadcast,
    finalize: Finalize,
}

/// Only the thread that opened MPI calls it.
const FUNNELED: c_int = 1;
/// Numbers in one call, whose count is an int.
const PIECE: usize = 1 << 28;

/// Which MPI started this process, as far as that can be told: where several are installed, only its own will do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flavour {
    OpenMpi,
    Mpich,
}

impl Flavour {
    /// Its libraries, then the others'.
    fn libraries(self) -> [&'static CStr; 4] {
        let open_mpi = c"libmpi.so.40";
        match self {
            Self::OpenMpi => [open_mpi, c"libmpi.so.12", c"libmpich.so.12", c"libmpi.so"],
            Self::Mpich => [c"libmpich.so.12", c"libmpi.so.12", open_mpi, c"libmpi.so"],
        }
    }
}

/// An open library.
struct Library(*mut c_void);

impl Library {
    fn open(flavour: Flavour) -> Option<Self> {
        let flags = libc::RTLD_NOW | libc::RTLD_GLOBAL;
        flavour.libraries().iter().find_map(|name| {
            // SAFETY: MPI's libraries may be opened by any process; none is ever closed.
            let opened = unsafe { libc::dlopen(name.as_ptr(), flags) };
            (!opened.is_null()).then_some(Self(opened))
        })
    }

    fn find(&self, name: &CStr) -> Option<*mut c_void> {
        let name: *const c_char = name.as_ptr();
        // SAFETY: the library is open.
        let found = unsafe { libc::dlsym(self.0, name) };
        (!found.is_null()).then_some(found)
    }

    fn calls(&self) -> Option<Calls> {
        // SAFETY: the functions of the MPI standard, with the signatures of its C binding.
        unsafe {
            Some(Calls {
                init: transmute::<*mut c_void, Init>(self.find(c"MPI_Init_thread")?),
                rank: transmute::<*mut c_void, Ask>(self.find(c"MPI_Comm_rank")?),
                size: transmute::<*mut c_void, Ask>(self.find(c"MPI_Comm_size")?),
                reduce: transmute::<*mut c_void, Reduce>(self.find(c"MPI_Reduce")?),
                broadcast: transmute::<*mut c_void, Broadcast>(self.find(c"MPI_Bcast")?),
                finalize: transmute::<*mut c_void, Finalize>(self.find(c"MPI_Finalize")?),
            })
        }
    }

    fn handles(&self) -> Handles {
        let open_mpi = || {
            Some(Handles {
                world: self.find(c"ompi_mpi_comm_world")? as usize,
                float: self.find(c"ompi_mpi_float")? as usize,
                sum: self.find(c"ompi_mpi_op_sum")? as usize,
                in_place: 1,
            })
        };
        open_mpi().unwrap_or(MPICH)
    }
}

impl Mpi {
    /// Joins the processes that were started with this one. The thread that calls is the one to make all other calls.
    ///
    /// # Errors
    /// No MPI on this machine.
    pub fn join(flavour: Flavour) -> Result<Self> {
        let missing = || refuse("this machine has no MPI library (libmpi.so)");
        let library = Library::open(flavour).ok_or_else(missing)?;
        let calls = library.calls().ok_or_else(missing)?;
        let handles = library.handles();
        let (mut provided, mut rank, mut size) = (0, 0, 0);
        // SAFETY: MPI is opened once in a process, by the binary's one session, before anything is asked of it.
        let codes = unsafe {
            [
                (calls.init)(null_mut(), null_mut(), FUNNELED, &mut provided),
                (calls.rank)(handles.world, &mut rank),
                (calls.size)(handles.world, &mut size),
            ]
        };
        if codes != [0; 3] || provided < FUNNELED {
            return Err(refuse(format!("MPI does not start (its codes: {codes:?})")));
        }
        Ok(Self {
            calls,
            handles,
            rank: rank as usize,
            size: size as usize,
        })
    }
}

fn check(code: c_int) -> Result<()> {
    match code {
        0 => Ok(()),
        code => Err(refuse(format!("MPI fails with its code {code}"))),
    }
}

impl Group for Mpi {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    /// On process 0, whose sum the others are then given: an all-reduce need not give each of them the same bits.
    fn sum(&self, values: &mut [f32]) -> Result<()> {
        let Handles {
            world,
            float,
            sum,
            in_place,
        } = self.handles;
        for piece in values.chunks_mut(PIECE) {
            let there: *mut c_void = piece.as_mut_ptr().cast();
            let (from, to) = match self.rank {
                0 => (in_place as *const c_void, there),
                _ => (there.cast_const(), null_mut()),
            };
            let count = piece.len() as c_int;
            // SAFETY: `count` floats lie at either address that is one.
            check(unsafe { (self.calls.reduce)(from, to, count, float, sum, 0, world) })?;
        }
        self.spread(values)
    }

    fn spread(&self, values: &mut [f32]) -> Result<()> {
        for piece in values.chunks_mut(PIECE) {
            let (there, count) = (piece.as_mut_ptr().cast(), piece.len() as c_int);
            let Handles { world, float, .. } = self.handles;
            // SAFETY: `count` floats lie there.
            check(unsafe { (self.calls.broadcast)(there, count, float, 0, world) })?;
        }
        Ok(())
    }

    fn finish(&self) -> Result<()> {
        // SAFETY: nothing is asked of MPI after this: the session ends.
        check(unsafe { (self.calls.finalize)() })
    }
}
