//! Hand-written pullbacks around fast code: the one bridge between our layers and candle's backward pass.
//!
//! candle's fused norm, softmax and rope have no backward and cut gradients silently, and its matmul computes gradients
//! of frozen weights that nobody asked for. Here the forward is any code at all, and the backward is written down.

use std::sync::Mutex;

use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, CustomOp2, CustomOp3, InplaceOp1, Layout, Result, Shape,
    Tensor, bail,
};

use super::gpu;

/// y and dL/dy → dL/dx for each input, `None` where it is not wanted. Captures what it needs, detached.
type Pullback = Box<dyn Fn(&Tensor, &Tensor) -> Result<Vec<Option<Tensor>>> + Send + Sync>;

/// Gives `output`, a freshly computed tensor, the gradient that `pullback` describes with respect to `inputs`.
///
/// If no input is tracked, nothing is recorded and nothing the pullback captured stays alive.
pub fn attach(
    inputs: &[&Tensor],
    output: Tensor,
    pullback: impl Fn(&Tensor) -> Result<Vec<Option<Tensor>>> + Send + Sync + 'static,
) -> Result<Tensor> {
    attach_reading(inputs, output, move |_, g| pullback(g))
}

/// The same for a pullback that reads the output too: `output` is handed over, so that nobody else may hold it.
pub fn attach_reading(
    inputs: &[&Tensor],
    output: Tensor,
    pullback: impl Fn(&Tensor, &Tensor) -> Result<Vec<Option<Tensor>>> + Send + Sync + 'static,
) -> Result<Tensor> {
    if !inputs.iter().any(|x| x.track_op()) {
        return Ok(output.detach());
    }
    let output = output.detach().contiguous()?;
    let op = Attached {
        shape: output.shape().clone(),
        output: Mutex::new(Some(output)),
        pullback: Box::new(pullback),
    };
    match inputs {
        [a] => a.apply_op1(op),
        [a, b] => a.apply_op2(b, op),
        [a, b, c] => a.apply_op3(b, c, op),
        _ => bail!("a pullback has one to three inputs"),
    }
}

struct Attached {
    output: Mutex<Option<Tensor>>,
    shape: Shape,
    pullback: Pullback,
}

impl Attached {
    fn take(&self) -> Result<Tensor> {
        let mut output = self
            .output
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        match output.take() {
            Some(output) => Ok(output),
            None => bail!("an attached output is handed over once"),
        }
    }

    /// Moves the computed values out of their tensor: no copy.
    fn cpu(&self) -> Result<(CpuStorage, Shape)> {
        struct Steal(Mutex<Option<CpuStorage>>);
        impl InplaceOp1 for Steal {
            fn name(&self) -> &'static str {
                "steal"
            }
            fn cpu_fwd(&self, storage: &mut CpuStorage, _: &Layout) -> Result<()> {
                let stolen = std::mem::replace(storage, CpuStorage::U8(Vec::new()));
                *self
                    .0
                    .lock()
                    .unwrap_or_else(|poisoned| poisoned.into_inner()) = Some(stolen);
                Ok(())
            }
        }
        let output = self.take()?;
        if output.layout().start_offset() != 0 {
            bail!("an attached output owns its storage");
        }
        let stolen = Steal(Mutex::new(None));
        output.inplace_op1(&stolen)?;
        let storage = stolen
            .0
            .into_inner()
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        match storage {
            Some(storage) => Ok((storage, self.shape.clone())),
            None => bail!("an attached output lies on the CPU"),
        }
    }

    fn cuda(&self) -> Result<(CudaStorage, Shape)> {
        Ok((gpu::steal(&self.take()?)?, self.shape.clone()))
    }

    fn pull(&self, output: &Tensor, gradient: &Tensor) -> Result<Vec<Option<Tensor>>> {
        // candle's gradients may carry graphs of their own, which would keep every activation alive
        (self.pullback)(&output.detach(), &gradient.detach())
    }
}

impl CustomOp1 for Attached {
    fn name(&self) -> &'static str {
        "vjp"
    }
    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        self.cpu()
    }
    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        self.cuda()
    }
    fn bwd(&self, _: &Tensor, y: &Tensor, g: &Tensor) -> Result<Option<Tensor>> {
        let mut gradients = self.pull(y, g)?;
        Ok(gradients[0].take())
    }
}

impl CustomOp2 for Attached {
    fn name(&self) -> &'static str {
        "vjp"
    }
    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.cpu()
    }
    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.cuda()
    }
    fn bwd(
        &self,
        _: &Tensor,
        _: &Tensor,
        y: &Tensor,
        g: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let mut gradients = self.pull(y, g)?;
        Ok((gradients[0].take(), gradients[1].take()))
    }
}

impl CustomOp3 for Attached {
    fn name(&self) -> &'static str {
        "vjp"
    }
    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.cpu()
    }
    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.cuda()
    }
    fn bwd(
        &self,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
        y: &Tensor,
        g: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let mut gradients = self.pull(y, g)?;
        Ok((
            gradients[0].take(),
            gradients[1].take(),
            gradients[2].take(),
        ))
    }
}
