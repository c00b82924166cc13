// The one symbol of an instruction set's library.
#include "kernels.h"

#define LZ_TEXT_OF(x) #x
#define LZ_TEXT(x) LZ_TEXT_OF(x)

extern "C" __attribute__((visibility("default"))) const layerzoo::Kernels* layerzoo_kernels() {
  using namespace layerzoo::LZ_ISA;
  static const layerzoo::Kernels table = {
      LZ_TEXT(LZ_ISA_NAME),
      {skinny_linear},
      {experts_scratch, experts_up, experts_down, experts_combine, experts_backward_scratch, experts_grad_hidden,
       experts_grad_x, experts_grad_w13, experts_grad_w2, experts_grad_small, route_scratch, route, route_backward},
      {multiply_add, exponentials},
      {pack,
       unpack,
       sum,
       selective_scan_scratch,
       selective_scan,
       selective_scan_backward_scratch,
       selective_scan_backward,
       causal_conv1d_scratch,
       causal_conv1d,
       causal_conv1d_rows_scratch,
       causal_conv1d_rows,
       causal_conv1d_backward,
       causal_conv1d_update,
       selective_state_update,
       ssd_packed_size,
       ssd_pack,
       ssd_chunk_scan_scratch,
       ssd_chunk_scan,
       ssd_carry_scratch,
       ssd_carry,
       ssd_part_size,
       ssd_chunk_scan_backward_scratch,
       ssd_chunk_scan_backward,
       ssd_unpack,
       linear_scan,
       linear_scan_backward}};
  return &table;
}
