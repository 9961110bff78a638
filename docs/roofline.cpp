// The two passes of the step, written by hand with AVX-512 intrinsics: how fast the rule can be on a processor core.
// Not a part of the package; docs/benchmarks.md quotes it. The arithmetic is that of src/lamb16/step/update.py, but for the
// e4m3 decode, which goes through float16 here. It prints ns a parameter for random data:
//
//     g++ -O3 -march=native -ffp-contract=off docs/roofline.cpp -o /tmp/roofline && /tmp/roofline 1048576
#include <immintrin.h>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <chrono>
#include <algorithm>
#include <vector>
using V=__m512; using I=__m512i;
static inline V F(I x){return _mm512_castsi512_ps(x);} static inline I B(V x){return _mm512_castps_si512(x);}
struct C{float dm,dv,nm,nv,rho,eps,bound,wd,floor,gf,em,ev,ss;int off,salt,skip;};
static inline V dec4(const uint8_t*p){ // e4m3 via fp16
  __m256i x=_mm256_slli_epi16(_mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)p)),8);
  x=_mm256_and_si256(_mm256_srai_epi16(x,1),_mm256_set1_epi16((short)0xBFFF));
  return _mm512_cvtph_ps(x);}
static inline V dec5(const uint8_t*p){
  __m256i x=_mm256_slli_epi16(_mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)p)),8);
  return _mm512_cvtph_ps(x);}
#define S(x) _mm512_set1_ps(x)
#define K(x) _mm512_set1_epi32(x)
struct U{V m,v;I a;V u;};  // the fresh moments, |m| and the update
static inline U update(V gg,V w,const uint8_t*M,const uint8_t*Vc,const C&c){
  V m=_mm512_add_ps(_mm512_mul_ps(dec4(M),S(c.dm)),_mm512_mul_ps(gg,S(c.nm)));
  V v=_mm512_add_ps(_mm512_mul_ps(dec5(Vc),S(c.dv)),_mm512_mul_ps(_mm512_mul_ps(gg,gg),S(c.nv)));
  V d=_mm512_add_ps(_mm512_mul_ps(_mm512_sqrt_ps(v),S(c.rho)),S(c.eps));
  I a=_mm512_and_si512(B(m),K(0x7fffffff));
  d=F(_mm512_max_epi32(B(d),B(_mm512_mul_ps(F(a),S(c.bound)))));
  V u=_mm512_add_ps(_mm512_div_ps(m,d),_mm512_mul_ps(w,S(c.wd)));
  return {m,v,a,u};}
void measure(const float*p,const float*g,const uint8_t*M,const uint8_t*Vc,const C&c,long n,double*out){
  I mm=_mm512_setzero_si512(),mv=mm; __m512d s0=_mm512_setzero_pd(),s1=s0,s2=s0,s3=s0;
  for(long i=0;i<n;i+=16){
    V gg=_mm512_mul_ps(_mm512_loadu_ps(g+i),S(c.gf)); V w=_mm512_loadu_ps(p+i);
    auto [m,v,a,u]=update(gg,w,M+i,Vc+i,c);
    I pc=_mm512_min_epi32(_mm512_max_epi32(B(_mm512_mul_ps(w,w)),K(0x3C23D70A)),K(0x3f800000));
    I uc=_mm512_min_epi32(_mm512_max_epi32(B(_mm512_mul_ps(u,u)),B(S(c.floor))),K(0x3f800000));
    mm=_mm512_max_epi32(mm,a); mv=_mm512_max_epi32(mv,B(v));
    s0=_mm512_add_pd(s0,_mm512_cvtps_pd(_mm512_castps512_ps256(F(pc))));s1=_mm512_add_pd(s1,_mm512_cvtps_pd(_mm512_extractf32x8_ps(F(pc),1)));
    s2=_mm512_add_pd(s2,_mm512_cvtps_pd(_mm512_castps512_ps256(F(uc))));s3=_mm512_add_pd(s3,_mm512_cvtps_pd(_mm512_extractf32x8_ps(F(uc),1)));
  }
  out[0]=_mm512_reduce_add_pd(_mm512_add_pd(s0,s1));out[1]=_mm512_reduce_add_pd(_mm512_add_pd(s2,s3));
  out[2]=_mm512_reduce_max_epi32(mm);out[3]=_mm512_reduce_max_epi32(mv);
}
static inline I enc(V x,I w,int drop,int rebias,int minn){
  I lifted=_mm512_sub_epi32(B(_mm512_add_ps(x,F(K(minn)))),K(1<<23));
  I noise=_mm512_srai_epi32(w,32-drop);
  I b=_mm512_add_epi32(_mm512_max_epi32(B(x),lifted),_mm512_add_epi32(noise,K((1<<(drop-1))-(rebias<<23))));
  return _mm512_srai_epi32(b,drop);}
void apply(float*__restrict p,const float*__restrict g,uint8_t*__restrict M,uint8_t*__restrict Vc,const C&c,long n){
  I index=_mm512_setr_epi32(0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15);
  for(long i=0;i<n;i+=16){
    V gg=F(_mm512_and_si512(B(_mm512_mul_ps(_mm512_loadu_ps(g+i),S(c.gf))),K(c.skip))); V w=_mm512_loadu_ps(p+i);
    auto [m,v,a,u]=update(gg,w,M+i,Vc+i,c);
    _mm512_storeu_ps(p+i,_mm512_sub_ps(w,F(_mm512_and_si512(B(_mm512_mul_ps(u,S(c.ss))),K(c.skip)))));
    I x=_mm512_add_epi32(index,K((int)i+c.salt));
    x=_mm512_xor_si512(x,_mm512_srli_epi32(x,13)); x=_mm512_mullo_epi32(x,K(0x8A3B8E57));
    x=_mm512_xor_si512(x,_mm512_srli_epi32(x,14)); x=_mm512_mullo_epi32(x,K(0xA2C9DAED));
    x=_mm512_add_epi32(x,K(c.off));
    I em=enc(_mm512_mul_ps(F(a),S(c.em)),x,20,120,121<<23);
    em=_mm512_or_si512(em,_mm512_and_si512(_mm512_srli_epi32(B(m),24),K(0x80)));
    I ev=enc(_mm512_mul_ps(v,S(c.ev)),x,21,112,113<<23);
    ev=_mm512_max_epi32(ev,_mm512_min_epi32(B(v),K(1)));
    _mm_storeu_si128((__m128i*)(M+i),_mm512_cvtepi32_epi8(em));
    _mm_storeu_si128((__m128i*)(Vc+i),_mm512_cvtepi32_epi8(ev));
  }
}
int main(int ac,char**av){
  long n=ac>1?atol(av[1]):1<<20; int reps=ac>2?atoi(av[2]):50;
  float*p=(float*)aligned_alloc(64,n*4),*g=(float*)aligned_alloc(64,n*4);uint8_t*M=(uint8_t*)aligned_alloc(64,n),*Vc=(uint8_t*)aligned_alloc(64,n);
  for(long i=0;i<n;i++){p[i]=(rand()%1000-500)*2e-4;g[i]=(rand()%1000-500)*2e-5;M[i]=rand()%0x70|(rand()%2?0x80:0);Vc[i]=rand()%0x70;}
  C c{.9f*1e-4f,.999f*1e-8f,.1f,.001f,.3f,1e-6f,.137f,.01f,1e-6f,1.f,1e4f,1e8f,1e-9f,12345,777,-1};
  double out[4];
  std::vector<double> a,b;
  for(int r=0;r<reps;r++){
    auto t0=std::chrono::steady_clock::now(); measure(p,g,M,Vc,c,n,out); asm volatile(""::"r"(out):"memory");
    auto t1=std::chrono::steady_clock::now(); apply(p,g,M,Vc,c,n);
    auto t2=std::chrono::steady_clock::now();
    a.push_back(std::chrono::duration<double>(t1-t0).count()/n*1e9);b.push_back(std::chrono::duration<double>(t2-t1).count()/n*1e9);
  }
  std::sort(a.begin(),a.end());std::sort(b.begin(),b.end());
  printf("n=%ld measure %.3f apply %.3f ns\n",n,a[reps/2],b[reps/2]);
}
