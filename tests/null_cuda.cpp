// A CUDA device whose kernels never run, for tests on machines without one. See null_cuda.py.
//
// Preloaded, it answers torch's calls of the runtime (cuda*), of the driver (cu*, what Triton's launcher needs), of cuBLAS
// and of cuDNN (its LSTM). Device memory is the host's and zero. It counts launches, copies and waits, and refuses within a
// stream capture what CUDA refuses. Functions that are not here are generated: `null_cuda.py` has the rules.
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <map>
#include <mutex>
#include <string>
#include <unordered_map>

namespace {

template <class T>
T& kept() {  // made at the first use, which may come before this file's own statics are made, and never destroyed
  static T* it = new T;
  return *it;
}
struct Counts : std::map<std::string, long> {};
struct Kernels : std::unordered_map<const void*, std::string> {};  // what a kernel's host function is called
struct OnDevice : std::map<uintptr_t, size_t> {};
struct Pinned : std::map<uintptr_t, size_t> {};
std::recursive_mutex lock;

void count(const std::string& what) {
  std::lock_guard<std::recursive_mutex> guard(lock);
  kept<Counts>()[what]++;
}

cudaStream_t capturing = nullptr;
unsigned long long captures = 0;
cudaStreamCaptureMode capture_mode;
thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;

cudaError_t refused(const char* what) {
  count(std::string("refused in a capture: ") + what);
  return cudaErrorStreamCaptureUnsupported;
}
// what a capture forbids to its own thread, or to all, unless they say that they know what they do
bool forbidden() {
  return capturing && capture_mode != cudaStreamCaptureModeRelaxed && thread_mode != cudaStreamCaptureModeRelaxed;
}

template <class Memory>
cudaError_t take(const char* what, void** pointer, size_t size) {
  if (forbidden()) return refused(what);
  size = (size + (4 << 20)) & ~size_t((2 << 20) - 1);  // torch cuts blocks of 2 MiB and more, aligned
  char* raw = (char*)mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (raw == MAP_FAILED) return cudaErrorMemoryAllocation;
  std::lock_guard<std::recursive_mutex> guard(lock);
  kept<Memory>()[(uintptr_t)raw] = size;
  *pointer = (void*)(((uintptr_t)raw + (2 << 20) - 1) & ~uintptr_t((2 << 20) - 1));
  count(what);
  return cudaSuccess;
}
template <class Memory>
bool in(const void* pointer) {
  std::lock_guard<std::recursive_mutex> guard(lock);
  auto after = kept<Memory>().upper_bound((uintptr_t)pointer);
  return after != kept<Memory>().begin() && (--after, (uintptr_t)pointer < after->first + after->second);
}

cudaError_t copy(void* target, const void* source, size_t size, bool wait) {
  bool to = in<OnDevice>(target), from = in<OnDevice>(source), pinned = in<Pinned>(to ? source : target);
  std::string kind = to && from ? "on the device" : std::string(to ? "up" : "down") + (pinned ? ", pinned" : ", pageable");
  if (capturing && (wait || (!(to && from) && !pinned))) return refused(("copy " + kind).c_str());
  count("copy " + kind);
  if (wait) count("wait for a copy " + kind);
  if (to && from) return cudaSuccess;  // a kernel as it were
  if (to) memcpy(target, source, size);
  else if (from) memset(target, size == 1, size);  // nothing was computed: 0, but a truth value is true
  else memcpy(target, source, size);
  return cudaSuccess;
}
cudaError_t launch(const void* function, cudaStream_t stream) {
  auto name = kept<Kernels>().find(function);
  count("launch " + (name == kept<Kernels>().end() ? std::string("?") : name->second));
  if (capturing && stream != capturing) count("refused in a capture: launch on another stream");
  return cudaSuccess;
}
int attribute(int which) {  // the same numbers in the runtime and in the driver
  switch (which) {
    case cudaDevAttrMaxThreadsPerBlock: return 1024;
    case cudaDevAttrMaxSharedMemoryPerBlock: return 49152;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: return 232448;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return 233472;
    case cudaDevAttrMaxRegistersPerBlock: case cudaDevAttrMaxRegistersPerMultiprocessor: return 65536;
    case cudaDevAttrMaxThreadsPerMultiProcessor: return 2048;
    case cudaDevAttrMultiProcessorCount: return 132;
    case cudaDevAttrWarpSize: case cudaDevAttrMaxBlocksPerMultiprocessor: return 32;
    case cudaDevAttrComputeCapabilityMajor: return 9;
    case cudaDevAttrComputeCapabilityMinor: return 0;
    case cudaDevAttrMaxGridDimX: return 2147483647;
    case cudaDevAttrMaxGridDimY: case cudaDevAttrMaxGridDimZ: return 65535;
    case cudaDevAttrClockRate: return 1980000;
    default: return 1;
  }
}

}  // namespace

extern "C" {

// for tests -------------------------------------------------------------------------------------------------------------
void null_cuda_count(const char* what) { count(what); }
int null_cuda_refuse(const char* what) { return capturing ? (int)refused(what) : 0; }
void null_cuda_reset() { std::lock_guard<std::recursive_mutex> guard(lock); kept<Counts>().clear(); }
const char* null_cuda_report() {
  std::lock_guard<std::recursive_mutex> guard(lock);
  static std::string text;
  text.clear();
  for (auto& [what, times] : kept<Counts>()) text += what + "\t" + std::to_string(times) + "\n";
  return text.c_str();
}

// the device ------------------------------------------------------------------------------------------------------------
cudaError_t cudaGetDeviceCount(int* count) { *count = 1; return cudaSuccess; }
cudaError_t cudaGetDevice(int* device) { *device = 0; return cudaSuccess; }
cudaError_t cudaSetDevice(int device) { return device ? cudaErrorInvalidDevice : cudaSuccess; }
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* found, int) {
  memset(found, 0, sizeof *found);
  strcpy(found->name, "null device");
  found->totalGlobalMem = 80ull << 30;
  found->sharedMemPerBlock = attribute(cudaDevAttrMaxSharedMemoryPerBlock);
  found->sharedMemPerBlockOptin = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  found->sharedMemPerMultiprocessor = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  found->regsPerBlock = found->regsPerMultiprocessor = 65536;
  found->warpSize = 32;
  found->maxThreadsPerBlock = found->maxThreadsDim[0] = found->maxThreadsDim[1] = 1024;
  found->maxThreadsDim[2] = 64;
  found->maxThreadsPerMultiProcessor = 2048;
  found->maxBlocksPerMultiProcessor = 32;
  found->maxGridSize[0] = 2147483647;
  found->maxGridSize[1] = found->maxGridSize[2] = 65535;
  found->major = 9;
  found->multiProcessorCount = 132;
  found->l2CacheSize = 50 << 20;
  found->memPitch = 2147483647;
  found->textureAlignment = 512;
  found->unifiedAddressing = found->concurrentKernels = found->managedMemory = 1;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) { *value = attribute(which); return cudaSuccess; }
cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) { *can = 0; return cudaSuccess; }
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* most) {
  if (least) *least = 0;
  if (most) *most = -5;
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) { *version = CUDA_VERSION; return cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int* version) { *version = CUDA_VERSION; return cudaSuccess; }
cudaError_t cudaMemGetInfo(size_t* free, size_t* total) { *free = 70ull << 30; *total = 80ull << 30; return cudaSuccess; }
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  *function = dlsym(RTLD_DEFAULT, name);
  if (!*function) *function = (void*)+[]() { return 0; };
  if (result) *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

// memory ----------------------------------------------------------------------------------------------------------------
cudaError_t cudaMalloc(void** pointer, size_t size) { return take<OnDevice>("cudaMalloc", pointer, size); }
cudaError_t cudaHostAlloc(void** pointer, size_t size, unsigned) { return take<Pinned>("cudaHostAlloc", pointer, size); }
cudaError_t cudaGetSymbolAddress(void** pointer, const void*) { return take<OnDevice>("symbol", pointer, 1 << 20); }
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* found, const void* pointer) {
  memset(found, 0, sizeof *found);
  found->type = in<OnDevice>(pointer) ? cudaMemoryTypeDevice : in<Pinned>(pointer) ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
  found->devicePointer = (void*)pointer;
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* target, const void* source, size_t size, cudaMemcpyKind, cudaStream_t) {
  return copy(target, source, size, false);
}
cudaError_t cudaMemcpy(void* target, const void* source, size_t size, cudaMemcpyKind) { return copy(target, source, size, true); }

// kernels ---------------------------------------------------------------------------------------------------------------
void** __cudaRegisterFatBinary(void*) { static void* handle[4]; return handle; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, void*, void*, void*, void*, int*) {
  kept<Kernels>()[host] = name;
}
char __cudaInitModule(void**) { return 1; }
cudaError_t cudaLaunchKernel(const void* f, dim3, dim3, void**, size_t, cudaStream_t stream) { return launch(f, stream); }
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* f, void**) { return launch(f, config->stream); }
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* f) { *kernel = (cudaKernel_t)f; return cudaSuccess; }
cudaError_t __cudaLaunchKernel(cudaKernel_t f, dim3, dim3, void**, size_t, cudaStream_t stream) { return launch((void*)f, stream); }
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* found, const void*) {
  memset(found, 0, sizeof *found);
  found->maxThreadsPerBlock = 1024;
  found->numRegs = 32;
  found->binaryVersion = found->ptxVersion = 90;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int, size_t, unsigned) {
  *blocks = 4;
  return cudaSuccess;
}

// streams, events, graphs -----------------------------------------------------------------------------------------------
cudaError_t cudaStreamGetPriority(cudaStream_t, int* priority) { *priority = 0; return cudaSuccess; }
cudaError_t cudaStreamQuery(cudaStream_t) { return forbidden() ? refused("cudaStreamQuery") : cudaSuccess; }
cudaError_t cudaEventQuery(cudaEvent_t) { return forbidden() ? refused("cudaEventQuery") : cudaSuccess; }
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t, cudaEvent_t) { *milliseconds = 1; return cudaSuccess; }
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode) {
  if (capturing) return cudaErrorIllegalState;
  capturing = stream;
  capture_mode = mode;
  captures++;
  count("capture");
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t* graph) {
  capturing = nullptr;
  *graph = (cudaGraph_t)calloc(1, 64);
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  if (capturing && !stream) return refused("the legacy stream");
  *status = capturing && stream == capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status, unsigned long long* id, cudaGraph_t* graph,
                                     const cudaGraphNode_t** nodes, const cudaGraphEdgeData** edges, size_t* number) {
  static char anything[64];
  *status = capturing && stream == capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  if (id) *id = captures;
  if (graph) *graph = (cudaGraph_t)anything;
  if (nodes) *nodes = nullptr;
  if (edges) *edges = nullptr;
  if (number) *number = 0;
  return cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) { std::swap(thread_mode, *mode); return cudaSuccess; }
cudaError_t cudaGraphGetNodes(cudaGraph_t, cudaGraphNode_t*, size_t* number) { *number = 1; return cudaSuccess; }

// cuBLAS: enumerations are ints ------------------------------------------------------------------------------------------
int cublasCreate_v2(void** handle) { if (forbidden()) return refused("cublasCreate"), 1; *handle = calloc(1, 64); return 0; }
int cublasGetMathMode(void*, int* mode) { *mode = 0; return 0; }
int cublasGetPointerMode_v2(void*, int* mode) { *mode = 0; return 0; }
int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int, void*, int* found) { *found = 1; return 0; }

// cuDNN: what an LSTM needs ----------------------------------------------------------------------------------------------
struct Tensor { int type, dims, sizes[8], strides[8]; };
struct Net { size_t inputs, hidden, layers, element, steps, rows; };
static size_t last_rows, last_steps;
int cudnnSetTensorNdDescriptor(Tensor* tensor, int type, int dims, const int* sizes, const int* strides) {
  tensor->type = type;
  tensor->dims = dims;
  memcpy(tensor->sizes, sizes, dims * sizeof(int));
  memcpy(tensor->strides, strides, dims * sizeof(int));
  return 0;
}
int cudnnGetTensorNdDescriptor(const Tensor* tensor, int most, int* type, int* dims, int* sizes, int* strides) {
  *type = tensor->type;
  *dims = tensor->dims;
  for (int d = 0; d < tensor->dims && d < most; d++) sizes[d] = tensor->sizes[d], strides[d] = tensor->strides[d];
  return 0;
}
int cudnnSetRNNDescriptor_v8(Net* net, int, int, int, int, int, int type, int, int math, int inputs, int hidden, int, int layers, void*, unsigned) {
  *net = {(size_t)inputs, (size_t)hidden, (size_t)layers, type == 1 ? sizeof(double) : sizeof(float)};
  count(math == 3 ? "cuDNN LSTM, exact products" : "cuDNN LSTM, products in TF32 allowed");
  return 0;
}
// where the weight (or bias) of a gate begins, in elements: of each layer four by the inputs, four by the hidden units; then biases
static size_t place(const Net* net, size_t layer, size_t gate, bool bias) {
  size_t H = net->hidden, inputs = layer ? H : net->inputs, before = 0;
  for (size_t l = 0; l < (bias ? net->layers : layer); l++) before += 4 * H * ((l ? H : net->inputs) + H);
  if (bias) return before + (8 * layer + gate) * H;
  return before + (gate < 4 ? gate * H * inputs : 4 * H * inputs + (gate - 4) * H * H);
}
int cudnnGetRNNWeightSpaceSize(void*, Net* net, size_t* size) { *size = place(net, net->layers, 0, true) * net->element; return 0; }
int cudnnGetRNNWeightParams(void*, Net* net, int layer, size_t, char* weights, int gate, Tensor* matrix, char** matrix_at, Tensor* bias, char** bias_at) {
  int H = net->hidden, inputs = gate < 4 && !layer ? net->inputs : H, type = net->element == sizeof(double);
  if (matrix) *matrix = {type, 3, {1, H, inputs}, {H * inputs, inputs, 1}};
  if (bias) *bias = {type, 3, {1, H, 1}, {H, 1, 1}};
  if (matrix_at) *matrix_at = weights + net->element * place(net, layer, gate, false);
  if (bias_at) *bias_at = weights + net->element * place(net, layer, gate, true);
  return 0;
}
int cudnnSetRNNDataDescriptor(void*, int, int, int steps, int rows, int, const int*, void*) { last_steps = steps; last_rows = rows; return 0; }
int cudnnGetRNNTempSpaceSizes(void*, Net* net, int, void*, size_t* work, size_t* reserve) {
  size_t gates = net->element * last_rows * last_steps * net->hidden * 8;
  if (work) *work = gates;
  if (reserve) *reserve = gates * net->layers;
  return 0;
}
int cudnnDropoutGetStatesSize(void*, size_t* size) { *size = 1 << 20; return 0; }

// the driver -------------------------------------------------------------------------------------------------------------
static char primary[64];
static thread_local CUcontext context = (CUcontext)primary;
struct Function { std::string name; };
CUresult cuInit(unsigned) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int* version) { *version = CUDA_VERSION; return CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice* device, int) { *device = 0; return CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int* count) { *count = 1; return CUDA_SUCCESS; }
CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute which, CUdevice) { *value = attribute(which); return CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext* found) { *found = context; return CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext given) { context = given; return CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice* device) { *device = 0; return CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t* value, CUlimit) { *value = 0; return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext* found, CUdevice) { *found = (CUcontext)primary; return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned* flags, int* active) { *flags = 0; *active = 1; return CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult, const char** text) { *text = "the null device"; return CUDA_SUCCESS; }
CUresult cuModuleLoadData(CUmodule* module, const void*) { *module = (CUmodule)calloc(1, 64); return CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction* f, CUmodule, const char* name) { *f = (CUfunction) new Function{name}; return CUDA_SUCCESS; }
CUresult cuFuncGetAttribute(int* value, CUfunction_attribute which, CUfunction) {
  *value = which == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 32;
  return CUDA_SUCCESS;
}
CUresult cuPointerGetAttribute(void* value, CUpointer_attribute which, CUdeviceptr pointer) {
  if (which == CU_POINTER_ATTRIBUTE_DEVICE_POINTER) *(CUdeviceptr*)value = pointer;
  else *(int*)value = 0;
  return CUDA_SUCCESS;
}
CUresult cuOccupancyMaxActiveClusters(int* number, CUfunction, const CUlaunchConfig*) { *number = 1; return CUDA_SUCCESS; }
CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction f, void**, void**) {
  count("launch triton " + ((Function*)f)->name);
  if (capturing && config->hStream != (CUstream)capturing) count("refused in a capture: launch on another stream");
  return CUDA_SUCCESS;
}

}  // extern "C"
