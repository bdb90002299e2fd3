#ifndef EDUBA_BASE_HEAP_H_
#define EDUBA_BASE_HEAP_H_

namespace eduba {

// Lets the process keep some hundred MiB of memory that it has freed, for the next time. A step of attention
// takes some megabytes and gives them back, many times a second; glibc would return each to the kernel, which
// clears every page anew. Call it first in main. Does nothing with other C libraries.
void KeepFreedMemory();

}  // namespace eduba

#endif  // EDUBA_BASE_HEAP_H_
