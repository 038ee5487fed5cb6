// What a process waits for at its first calls (gka_cuda first).
#pragma once

// Prints one line of JSON a call, of both solvers or of `direct` alone (which is then the first);
// 0, or 1 where an output is not finite. To be called before anything else of CUDA.
int time_first_calls(bool direct);
