//! Gradients by hand-written pullbacks: what was computed is recorded, and read backwards.
//!
//! candle's own backward pass is not used. Its fused norm, softmax and rope have none and cut gradients silently, its matmul
//! computes gradients of frozen weights that nobody asked for, and it adds every gradient to zeros first. Here the forward
//! is any code at all, the backward is written beside it, and a gradient that nothing is added to is handed on as it is.
//!
//! A thread records on its own tape while it is inside [`record`], and nothing otherwise. Only [`attach`] and what is made
//! of it is recorded: candle's operators between two recorded tensors would cut the gradient, so [`super::ops`] has those
//! that a decoder needs.

use std::cell::RefCell;
use std::collections::{HashMap, HashSet};

use candle_core::{Result, Tensor, TensorId};

use super::gpu;

/// dL/dy of each output → dL/dx of each input, `None` where there is none. Captures what it needs.
type Pullback = Box<dyn FnOnce(&[Option<Tensor>]) -> Result<Vec<Option<Tensor>>>>;

struct Node {
    /// Of those that are tracked.
    inputs: Vec<Option<TensorId>>,
    outputs: Vec<TensorId>,
    pullback: Pullback,
}

/// What a computation did to variables.
#[derive(Default)]
pub struct Tape {
    nodes: Vec<Node>,
    tracked: HashSet<TensorId>,
}

thread_local! {
    static TAPE: RefCell<Option<Tape>> = const { RefCell::new(None) };
}

/// Runs `f` and records what it does to variables and to `leaves`.
pub fn record<T, E>(
    leaves: &[&Tensor],
    f: impl FnOnce() -> std::result::Result<T, E>,
) -> std::result::Result<(T, Tape), E> {
    let tape = Tape {
        nodes: Vec::new(),
        tracked: leaves.iter().map(|leaf| leaf.id()).collect(),
    };
    // also where f panics: a thread that goes on would record for ever
    struct Restored(Option<Tape>);
    impl Drop for Restored {
        fn drop(&mut self) {
            TAPE.set(self.0.take());
        }
    }
    let outer = Restored(TAPE.replace(Some(tape)));
    let result = f()?;
    let tape = TAPE.take().unwrap_or_default();
    drop(outer);
    Ok((result, tape))
}

/// Whether a gradient of this tensor is wanted.
pub fn tracked(tensor: &Tensor) -> bool {
    TAPE.with_borrow(|tape| {
        let on = |tape: &Tape| tensor.is_variable() || tape.tracked.contains(&tensor.id());
        tape.as_ref().is_some_and(on)
    })
}

/// Gives `output`, a freshly computed tensor, the gradient that `pullback` describes with respect to `inputs`.
///
/// If no input is tracked, nothing is recorded and nothing the pullback captured stays alive.
pub fn attach(
    inputs: &[&Tensor],
    output: Tensor,
    pullback: impl FnOnce(&Tensor) -> Result<Vec<Option<Tensor>>> + 'static,
) -> Result<Tensor> {
    let of_one = |gradients: &[Option<Tensor>]| match &gradients[0] {
        Some(gradient) => pullback(gradient),
        None => Ok(Vec::new()),
    };
    let mut outputs = attach_many(inputs, vec![output], of_one)?;
    Ok(outputs.remove(0))
}

/// The same for several outputs, some of which may have no gradient.
pub fn attach_many(
    inputs: &[&Tensor],
    outputs: Vec<Tensor>,
    pullback: impl FnOnce(&[Option<Tensor>]) -> Result<Vec<Option<Tensor>>> + 'static,
) -> Result<Vec<Tensor>> {
    let inputs: Vec<Option<TensorId>> = (inputs.iter())
        .map(|input| tracked(input).then(|| input.id()))
        .collect();
    let outputs: Vec<Tensor> = outputs.iter().map(Tensor::detach).collect();
    if inputs.iter().all(Option::is_none) {
        return Ok(outputs);
    }
    TAPE.with_borrow_mut(|tape| {
        if let Some(tape) = tape {
            let ids: Vec<TensorId> = outputs.iter().map(Tensor::id).collect();
            tape.tracked.extend(&ids);
            tape.nodes.push(Node {
                inputs,
                outputs: ids,
                pullback: Box::new(pullback),
            });
        }
    });
    Ok(outputs)
}

/// a + b, without a gradient.
pub fn plus(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    match gpu::add(a, b)? {
        Some(y) => Ok(y),
        None => a.detach() + b.detach(),
    }
}

/// dL/dx of what was not made of anything recorded: variables and leaves.
#[derive(Default)]
pub struct Gradients(HashMap<TensorId, Tensor>);

impl Gradients {
    pub fn take(&mut self, of: &Tensor) -> Option<Tensor> {
        self.0.remove(&of.id())
    }

    fn add(&mut self, to: TensorId, gradient: Tensor) -> Result<()> {
        let sum = match self.0.remove(&to) {
            Some(sum) => plus(&sum, &gradient)?,
            None => gradient,
        };
        self.0.insert(to, sum);
        Ok(())
    }
}

impl Tape {
    /// Whether nothing was done to anything that is tracked.
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    /// The gradients of L from dL/dy of one recorded tensor.
    pub fn back(self, y: &Tensor, gradient: Tensor) -> Result<Gradients> {
        self.back_from(vec![(y.clone(), gradient)])
    }

    /// The gradients of L from those of some tensors, recorded ones or variables. What a step needed is dropped with it.
    pub fn back_from(self, known: Vec<(Tensor, Tensor)>) -> Result<Gradients> {
        let mut gradients = Gradients::default();
        for (y, gradient) in known {
            gradients.add(y.id(), gradient)?;
        }
        for node in self.nodes.into_iter().rev() {
            let of_outputs: Vec<Option<Tensor>> = (node.outputs.iter())
                .map(|output| gradients.0.remove(output))
                .collect();
            if of_outputs.iter().all(Option::is_none) {
                continue;
            }
            let of_inputs = (node.pullback)(&of_outputs)?;
            for (input, gradient) in node.inputs.into_iter().zip(of_inputs) {
                if let (Some(input), Some(gradient)) = (input, gradient) {
                    gradients.add(input, gradient)?;
                }
            }
        }
        Ok(gradients)
    }
}

#[cfg(test)]
mod tests {
    use super::super::ops::{add, scaled};
    use super::*;
    use candle_core::{Device, Var};

    fn numbers(t: Option<Tensor>) -> Vec<f32> {
        t.and_then(|t| t.to_vec1().ok()).expect("a gradient")
    }

    #[test]
    fn gradients_of_what_is_read_twice_add_up_and_of_what_is_not_tracked_there_are_none() {
        let x = Var::new(&[1f32, 2.0], &Device::Cpu).expect("x");
        let leaf = Tensor::new(&[3f32, 4.0], &Device::Cpu).expect("a leaf");
        let other = Tensor::new(&[5f32, 6.0], &Device::Cpu).expect("no leaf");
        let computed = || -> Result<Tensor> {
            let twice = add(&scaled(&x, 2.0)?, &x)?;
            add(&add(&twice, &scaled(&leaf, 7.0)?)?, &scaled(&other, 9.0)?)
        };
        let (y, tape) = record(&[&leaf], computed).expect("computes");
        let seed = Tensor::new(&[1f32, 10.0], &Device::Cpu).expect("dL/dy");
        let known = vec![(y, seed.clone()), (x.as_tensor().clone(), seed)];
        let mut gradients = tape.back_from(known).expect("goes back");
        // three times by way of y, and once more known
        assert_eq!(numbers(gradients.take(&x)), [4.0, 40.0]);
        assert_eq!(numbers(gradients.take(&leaf)), [7.0, 70.0]);
        assert!(gradients.take(&other).is_none());
    }

    #[test]
    fn nothing_is_recorded_outside_not_even_behind_a_panic() {
        let x = Var::new(&[1f32], &Device::Cpu).expect("x");
        let panicked = std::panic::catch_unwind(|| {
            record(&[], || -> Result<()> { panic!("in the middle") }).map(drop)
        });
        assert!(panicked.is_err() && !tracked(&x));
        let (inner, _) = record(&[], || {
            record(&[], || scaled(&x, 2.0)).map(|(_, tape)| tape.is_empty())
        })
        .expect("records");
        assert!(!inner && !tracked(&x));
    }
}
